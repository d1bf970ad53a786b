"""A checkpoint of any layout as a folder that other software loads, compared with the checkpoint before it gets its name.

OUT/config.json, generation_config.json         of transformers; its native class brings two .py files
OUT/model.safetensors                           float32, or several files and model.safetensors.index.json
OUT/model.gguf                                  instead of all those, for llama.cpp
OUT/tokenizer.json, tokenizer_config.json
OUT/README.md, equivalence.json                 model card; both models' logits on the same text
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from configs.durable import sync, write_text
from configs.errors import UserError
from configs.schema import Config
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer import Tokenizer
from model.attention.registry import attention_variant
from model.huggingface import native
from model.huggingface.gguf_file import gguf_refusal, write_gguf
from model.huggingface.hosts import Host, Match, Shape, find_host
from model.huggingface.shards import Make, read_shards, write_shards
from model.huggingface.streamed import our_logits, stock_logits
from pretrain.checkpoint import COMMON_FILES, newest_checkpoint, read_config, verify
from pretrain.equivalence import Equivalence, compare
from pretrain.model_card import model_card
from pretrain.weights import Weights, weight_files

Format = Literal["auto", "stock", "native", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
SEQUENCES, LONGEST = 2, 256  # of the text that both models read
Say = Callable[[str], object]


@dataclass(frozen=True)
class Source:
    """A checkpoint, verified."""

    folder: Path
    config: Config
    weights: Weights
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Plan:
    """What is written: the kind, the host (None: our own class), and what its configuration says beside the model's."""

    kind: Format
    host: Host | None
    shape: Shape

    @property
    def architecture(self) -> str:
        return self.host.name if self.host else "manyheads"


def export(checkpoint: Path, output: Path, kind: Format, largest_shard: int, text: Path | None, say: Say) -> Path:
    """Write `output` from a run's folder (its newest checkpoint) or a checkpoint folder; `output` itself.

    `largest_shard` is in bytes; `text` is what the models are compared on, by default pages of Python's own documentation.
    UserError for anything that cannot be exported exactly; then nothing is left behind.
    """
    _check_output(output)
    words = _text(text)
    source = read_source(checkpoint)
    plan = make_plan(source, kind)
    say(f"reads   {source.folder}")
    say(f"format  {plan.kind}, {plan.architecture}, {_heads(source, plan)}")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        report = _write(source, plan, partial, largest_shard, words)
        sync(partial)
        if output.exists():
            output.rmdir()  # empty
        partial.rename(output)
        sync(output.parent)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); nothing was written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for name in ("float64", "float32"):
        difference = getattr(report, name)
        say(f"{name} logits differ by {difference.largest:.1e}, rounding may by {difference.allowed:.1e}")
    say(f"written {output}")
    return output


def read_source(path: Path) -> Source:
    """UserError for what is no complete checkpoint, or one whose files are not what was written."""
    folder = newest_checkpoint(path)
    verify(folder, COMMON_FILES)
    config = read_config(folder)
    verify(folder, weight_files(folder))
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    rows = config.model.vocab_size
    assert rows is not None
    if tokenizer.vocab_size > rows:
        raise UserError(f"{folder / TOKENIZER}: has {tokenizer.vocab_size} ids, the model only {rows}: not its tokenizer")
    return Source(folder, config, Weights(folder), tokenizer)


def make_plan(source: Source, kind: Format) -> Plan:
    """`auto` is a stock architecture whose cache is as small as the model's own, else our own class."""
    model, tokenizer = source.config.model, source.tokenizer
    length = model.max_position_embeddings or source.config.data.sequence_length
    own_heads = attention_variant(model.attention).kv_heads(model)
    ours = Shape(tokenizer.vocab_size, length, own_heads)
    match = find_host(model)
    if kind == "auto":
        kind = "native" if match.host is None or match.kv_heads > own_heads else "stock"
    if kind == "native":
        return Plan(kind, None, ours)
    host = _host(match, kind)
    return Plan(kind, host, replace(ours, kv_heads=match.kv_heads))


def _host(match: Match, kind: Format) -> Host:
    if match.host is None:
        raise UserError(f"--format {kind}: {match.reason}; or take --format native")
    refusal = gguf_refusal(match.host) if kind == "gguf" else None
    if refusal is not None:
        raise UserError(f"--format {kind}: {refusal}; or take --format stock or native")
    return match.host


def _heads(source: Source, plan: Plan) -> str:
    model = source.config.model
    return f"{model.num_heads} heads on {plan.shape.kv_heads} of keys and values"


def _check_output(output: Path) -> None:
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"{output}: is there already and not empty; choose another folder or delete it")
    if not output.resolve().parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.resolve().parent}")


def _text(path: Path | None) -> str:
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or error})") from error


def _write(source: Source, plan: Plan, folder: Path, largest_shard: int, words: str) -> Equivalence:
    """Everything of the output. Raises OSError."""
    settings, makes = _settings(source, plan), _makes(source, plan, source.weights)
    if plan.kind == "gguf":
        assert plan.host is not None
        model, tokenizer = source.config.model, source.tokenizer
        write_gguf(
            folder / "model.gguf",
            plan.host,
            model,
            plan.shape,
            source.weights,
            tokenizer.text,
            tokenizer.end_of_document,
            source.folder.parent.parent.name,
        )
        written = makes
    else:
        sizes = {name: make().shape for name, make in _makes(source, plan, _hollow(source)).items()}
        written = read_shards(folder, write_shards(folder, makes, sizes, largest_shard))
        _write_settings(source, plan, settings, folder)
    report = _compare(source, plan, settings, makes, written, words)
    write_text(folder / "equivalence.json", json.dumps(asdict(report), indent=2) + "\n")
    write_text(
        folder / "README.md", model_card(source.folder, source.config, source.tokenizer, plan.kind, plan.architecture, report)
    )
    return report


def _settings(source: Source, plan: Plan) -> Any:
    """The configuration as transformers has it."""
    from transformers import AutoConfig

    model, end = source.config.model, source.tokenizer.end_of_document
    if plan.host is None:
        native.register()
        settings: Any = native.native_config(model, plan.shape)
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = end
    else:
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
        settings = AutoConfig.for_model(plan.host.name, **plan.host.settings(model, plan.shape), **ends)
    settings.dtype = "float32"
    return settings


def _makes(source: Source, plan: Plan, read: Callable[[str], Tensor]) -> dict[str, Make]:
    """What makes each tensor of the exported model."""
    model = source.config.model
    return dict(plan.host.tensors(model, read, plan.shape) if plan.host else native.native_tensors(model, read, plan.shape))


def _hollow(source: Source) -> Callable[[str], Tensor]:
    """Parameters without memory."""
    return lambda name: torch.empty(source.weights.shapes[name], device="meta")


def _write_settings(source: Source, plan: Plan, settings: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(settings))
    settings.architectures = [kind.__name__]
    if plan.host is None:
        settings.auto_map = native.AUTO_MAP
        for path in native.CODE_FILES:
            shutil.copyfile(path, folder / path.name)
    settings.save_pretrained(folder)
    end = source.tokenizer.end_of_document
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(folder)
    write_text(folder / TOKENIZER, source.tokenizer.text)
    marker = source.tokenizer.decode([end])
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / TOKENIZER),
        bos_token=marker,
        eos_token=marker,
        pad_token=marker,
        model_max_length=plan.shape.length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _compare(
    source: Source, plan: Plan, settings: Any, makes: Mapping[str, Make], written: Mapping[str, Make], words: str
) -> Equivalence:
    model = source.config.model
    tokens_BS = _tokens(source, words)
    blocks = plan.host.blocks if plan.host else "model.blocks"

    def theirs(dtype: torch.dtype) -> Tensor:
        tensors = makes if dtype == torch.float64 else written
        return stock_logits(settings, blocks, tensors, tokens_BS, dtype)

    return compare(
        tokens_BS,
        lambda dtype: our_logits(model, source.weights, tokens_BS, dtype),
        theirs,
        plan.host is None or plan.host.wide,
    )


def _tokens(source: Source, words: str) -> Tensor:
    """(B, S): documents begin after an end of document, as in training."""
    longest = min(LONGEST, source.config.data.sequence_length, source.config.model.max_position_embeddings or LONGEST)
    ids = source.tokenizer.encode(words[: 16 * SEQUENCES * LONGEST])
    needed = SEQUENCES * (longest - 1)
    if len(ids) < needed:
        raise UserError(f"--text: has {len(ids)} tokens, {needed} are needed")
    end = torch.full((SEQUENCES, 1), source.tokenizer.end_of_document)
    return torch.cat([end, torch.tensor(ids[:needed]).view(SEQUENCES, -1)], dim=1)
