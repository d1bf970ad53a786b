"""Fine-tune an exported model on your text with LoRA: `python examples/finetune_lora.py exported --data notes/ --output lora`.

Writes `adapter/` for peft, with --merge also `merged/`, an ordinary folder for from_pretrained, and `results.json`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository

import argparse
import math
from collections.abc import Iterator
from typing import Any

from configs.errors import UserError
from data_pipeline.prepare.documents import ReadOptions, Skipped
from data_pipeline.prepare.sources import find_sources
from examples.common import (
    add_shared_arguments,
    check_folders,
    chosen_length,
    interpreter_topics,
    load,
    load_tokenizer,
    save_code,
    training_arguments,
    write_results,
)
from launch.common import number, run_command, whole_number

# Linear layers by `model_type`: those of attention and MLP, without the head and the embeddings.
TARGETS = {
    "gpt_bigcode": ["c_attn", "c_proj", "c_fc"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
    "mpt": ["Wqkv", "out_proj", "up_proj", "down_proj"],
}
TEXT_FILES = {".txt", ".md", ".rst", ".py"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_shared_arguments(parser, learning_rate=1e-3, batch_size=8)
    add = parser.add_argument
    known = ", ".join(sorted(TEXT_FILES))
    source = f"a text file ({known}), a .jsonl with a field `text`, a folder of these, or docs: Python's language reference"
    add("--data", required=True, metavar="PATH", help=source)
    add("--block", type=whole_number(2), metavar="N", help="tokens of a sequence; by default 512 or what the model takes")
    add("--held-out", type=number(0.001, 0.5), default=0.1, metavar="X", help="share at the end of the text to measure on")
    add("--rank", type=whole_number(1), default=8, metavar="N", help="rank of the adapter's matrices")
    add("--alpha", type=number(0.001, 1e4), default=16.0, metavar="X", help="the adapter is scaled by alpha / rank")
    add("--dropout", type=number(0, 0.99), default=0.0, metavar="X", help="in the adapter")
    add("--targets", default="auto", metavar="A,B,…", help="names of the linear layers to adapt; auto: attention and MLP")
    add("--merge", action="store_true", help="also write the model with the adapter added into its weights")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    check_folders(arguments.model, arguments.output, arguments.trust_remote_code)
    texts = interpreter_topics() if arguments.data == "docs" else list(read_texts(Path(arguments.data)))

    import torch
    from transformers import AutoModelForCausalLM, Trainer, default_data_collator, set_seed

    set_seed(arguments.seed)
    trust = arguments.trust_remote_code
    tokenizer = load_tokenizer(arguments.model, trust)
    base = load(arguments.model, AutoModelForCausalLM.from_pretrained, trust_remote_code=trust, dtype=torch.float32)
    block = chosen_length(base.config, arguments.block, "--block")
    training, held_out = split_blocks(pack(tokenizer, texts, block), arguments.held_out, block)

    model = with_adapter(arguments, base)
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=training_arguments(arguments, remove_unused_columns=False, label_names=["labels"]),
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=default_data_collator,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

    model.save_pretrained(arguments.output / "adapter")
    tokenizer.save_pretrained(arguments.output / "adapter")
    if arguments.merge:
        merged = model.merge_and_unload()
        merged.save_pretrained(arguments.output / "merged")
        tokenizer.save_pretrained(arguments.output / "merged")
        save_code(arguments.model, arguments.output / "merged")
    blocks = {"training_blocks": len(training), "held_out_blocks": len(held_out), "tokens_of_a_block": block}
    write_results(arguments.output, blocks | {"held_out_loss_before": before, "held_out_loss_after": after})


def with_adapter(arguments: argparse.Namespace, base: Any) -> Any:
    """The model with its weights frozen and a new adapter, which has no effect yet."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        target_modules=find_targets(base, arguments.targets),
        fan_in_fan_out=base.config.model_type == "gpt2",  # its Conv1D keeps weights transposed
    )
    return get_peft_model(base, lora)


def read_texts(path: Path) -> Iterator[str]:
    """Documents in the order of file names."""
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder")
    known = TEXT_FILES | {".jsonl"}
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in known)
    if not files or not known.issuperset(file.suffix for file in files):
        raise UserError(f"--data {path}: holds no {', '.join(sorted(known))}")
    for file in files:
        if file.suffix == ".jsonl":
            yield from texts_of_lines(file)
            continue
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: is not UTF-8") from error


def texts_of_lines(file: Path) -> Iterator[str]:
    """The documents of JSON lines, as launch/prepare.py reads them."""
    for source in find_sources([str(file)]):
        for text in source.documents(ReadOptions()):
            if text is Skipped.NOT_UTF8:
                raise UserError(f"{file}: holds text that is not UTF-8")
            if isinstance(text, str):
                yield text


def pack(tokenizer: Any, texts: list[str], block: int) -> list[list[int]]:
    """Concatenate all texts, each followed by an end of text, and split them into blocks; the remainder is dropped."""
    ids = [
        token
        for text in texts
        if text.strip()
        for token in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    ]
    return [ids[start : start + block] for start in range(0, len(ids) - block + 1, block)]


def split_blocks(blocks: list[list[int]], share: float, block: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training blocks and, from the end, held-out blocks."""
    if len(blocks) < 2:
        raise UserError(
            f"--data: gives {len(blocks)} blocks of {block} tokens; two are needed: give more text or a smaller --block"
        )
    samples = [{"input_ids": ids, "labels": ids} for ids in blocks]
    kept = len(samples) - math.ceil(share * len(samples))
    return samples[:kept], samples[kept:]


def find_targets(model: Any, asked: str) -> list[str]:
    """The names of the layers that LoRA adapts, or their last parts."""
    from torch import nn

    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    names = {name.rpartition(".")[2] for name in linear}
    if asked != "auto":
        wanted = asked.split(",")
        missing = [name for name in wanted if name not in names]
        if missing:
            raise UserError(f"--targets: the model has no linear layer {', '.join(missing)}; it has {', '.join(sorted(names))}")
        return wanted
    # Of our own class all linear layers in blocks, by complete names: layers of several kinds may share the last part.
    return TARGETS.get(model.config.model_type) or [name for name in linear if ".blocks." in name]


if __name__ == "__main__":
    run_command(main, one_process=True)
