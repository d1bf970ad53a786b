"""Generation by exported models in transformers: `python benchmarks/generation.py --json generation.json`.

MHA and MHE of the same width, depth and heads, with random weights, as launch/export.py would write them: MHA as gpt2, MHE as
stock gpt_bigcode and as the native class. All read a prompt, then generate tokens greedily with transformers' cache,
alternating in one process. `prefill` is the time of the prompt, `tokens/s` the rate of the full batch after it, `KV bytes` the
size of the cache at the end, counted from its tensors. Figures are medians over rounds; `speed` is MHA's time per token over
the row's.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

from configs.schema import ModelConfig
from launch.common import output_file, run_command, whole_number

VOCABULARY = 4096
CONTENDERS = (("mha", "stock"), ("mhe_add", "stock"), ("mhe_add", "native"), ("mhe_mul", "stock"), ("mhe_mul", "native"))


@dataclass(frozen=True)
class Row:
    attention: str
    format: str
    architecture: str
    heads: int
    head_dim: int
    parameters: int
    prompt: int
    batch: int
    new_tokens: int
    kv_bytes: int
    prefill_s: float
    token_s: float  # of one step of the full batch
    runs: int


def build(config: ModelConfig, kind: str, length: int) -> Any:
    """The exported model, in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from model.decoder import DecoderLM
    from model.huggingface import native
    from model.huggingface.stock import Shape, find_stock
    from model.initialization import init_weights

    ours, match = DecoderLM(config), find_stock(config)
    init_weights(ours, 1)
    assert match.stock is not None
    shape = Shape(VOCABULARY, length, match.heads, match.kv_heads)
    if kind == "native":
        native.register()
        settings: Any = native.native_config(config, shape)
        named = native.native_tensors(config, ours.get_parameter, shape)
    else:
        settings = AutoConfig.for_model(match.stock.name, **match.stock.settings(config, shape), bos_token_id=0, eos_token_id=0)
        named = match.stock.tensors(config, ours.get_parameter, shape)
    model = AutoModelForCausalLM.from_config(settings)
    missing = model.load_state_dict({name: make().detach().float() for name, make in named}, strict=False)
    assert not missing.unexpected_keys
    model.tie_weights()
    return model.eval()


def generate(model: Any, prompt_BS: Any, new_tokens: int) -> tuple[float, float, int]:
    """Seconds for the prompt, for each step after it, and bytes of the cache at the end."""
    import torch

    def now() -> float:
        if prompt_BS.is_cuda:
            torch.cuda.synchronize()
        return perf_counter()

    with torch.inference_mode():
        started = now()
        out = model(prompt_BS, use_cache=True, logits_to_keep=1)
        prefilled = now()
        for _ in range(new_tokens):
            tokens_B1 = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(tokens_B1, past_key_values=out.past_key_values, use_cache=True)
        ended = now()
    cached = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
    return prefilled - started, (ended - prefilled) / new_tokens, sum(x.numel() * x.element_size() for x in cached)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length = arguments.prompt + arguments.new_tokens
    models = {}
    for attention, kind in CONTENDERS:
        config = ModelConfig(
            attention=attention,
            hidden_size=arguments.width,
            num_layers=arguments.layers,
            num_heads=arguments.heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=length,
        )
        models[attention, kind] = build(config, kind, length).to(device)
    prompt_BS = torch.randint(VOCABULARY, (arguments.batch, arguments.prompt), generator=torch.Generator().manual_seed(0))
    prompt_BS = prompt_BS.to(device)
    found: dict[tuple[str, str], list[tuple[float, float, int]]] = {name: [] for name in models}
    for run in range(-1, arguments.runs):
        for name, model in models.items():
            figures = generate(model, prompt_BS, arguments.new_tokens if run >= 0 else 2)
            if run >= 0:
                found[name].append(figures)
    for (attention, kind), runs in found.items():
        model = models[attention, kind]
        prefill, token, kv_bytes = (median(column) for column in zip(*runs, strict=True))
        yield Row(
            attention,
            kind,
            model.config.model_type,
            arguments.heads,
            arguments.width // arguments.heads,
            sum(parameter.numel() for parameter in model.parameters()),
            arguments.prompt,
            arguments.batch,
            arguments.new_tokens,
            int(kv_bytes),
            prefill,
            token,
            len(runs),
        )


HEADER = (
    f"{'attention':<9} {'format':<7} {'architecture':<12} {'parameters':>10} {'KV bytes':>12} {'of MHA':>7} "
    f"{'prefill s':>9} {'tokens/s':>9} {'speed':>6}"
)


def line(row: Row, mha: Row) -> str:
    return (
        f"{row.attention:<9} {row.format:<7} {row.architecture:<12} {row.parameters / 1e6:>9.2f}M {row.kv_bytes:>12,} "
        f"{row.kv_bytes / mha.kv_bytes:>7.2%} {row.prefill_s:>9.2f} {row.batch / row.token_s:>9.1f} "
        f"{mha.token_s / row.token_s:>5.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"width": 512, "layers": 4, "heads": 64, "prompt": 1024, "batch": 8, "new-tokens": 32, "runs": 5}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=whole_number(1), default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="default: all cores")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    if arguments.width % arguments.heads:
        parser.error(f"--width {arguments.width}: must be a multiple of --heads ({arguments.heads})")

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.layers} layers × {arguments.width}, {arguments.heads} heads, prompt {arguments.prompt}, "
        f"batch {arguments.batch}, {platform.machine()}, {where}\n{HEADER}"
    )
    rows = list(measure(arguments))
    for row in rows:
        print(line(row, rows[0]))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main, one_process=True)
