"""Export a checkpoint of any layout to a folder that other software loads; checked against the checkpoint before it appears.

OUT/config.json, generation_config.json         of transformers; its native class brings two .py files
OUT/model.safetensors                           float32, or several files and model.safetensors.index.json
OUT/model.gguf                                  replaces the files above for llama.cpp
OUT/tokenizer.json, tokenizer_config.json
OUT/README.md, equivalence.json                 model card; both models' logits on the same text
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configs.durable import write_text
from configs.errors import UserError
from configs.schema import Config, ModelConfig
from data_pipeline.folder import building_folder, check_new_folder
from data_pipeline.prepare.tokenizer import PROBES, Tokenizer
from data_pipeline.read.manifest import TOKENIZER
from model.costs.memory import kv_cache_bytes_per_token
from model.huggingface import native
from model.huggingface.fold import Make, Read
from model.huggingface.gguf_file import gguf_refusal, read_gguf, write_gguf
from model.huggingface.shards import read_shards, write_shards
from model.huggingface.stock import Match, Named, Shape, StockArchitecture, find_stock, tensor_sizes
from model.huggingface.streamed import our_logits, stock_logits
from model.registry import ability_fault
from pretrain.checkpoints.folder import COMMON_FILES, newest_checkpoint, read_config, verify
from pretrain.checkpoints.unsharded import Weights, Which, weight_files
from pretrain.inference import not_finite
from pretrain.interop.equivalence import Equivalence, compare
from pretrain.interop.model_card import Origin, model_card, origin_of

Format = Literal["auto", "stock", "native", "gguf"]
LONGEST = 256  # tokens of the text that both models read
Say = Callable[[str], object]


@dataclass(frozen=True)
class Source:
    """A verified checkpoint."""

    folder: Path
    config: Config
    weights: Weights
    tokenizer: Tokenizer
    origin: Origin


@dataclass(frozen=True)
class Plan:
    """What is written: the kind, the stock architecture (None: our own class), and the shape in its configuration."""

    kind: Format
    stock: StockArchitecture | None
    shape: Shape

    @property
    def architecture(self) -> str:
        return self.stock.name if self.stock else "manyheads"


def export(
    checkpoint: Path,
    output: Path,
    kind: Format,
    largest_shard: int,
    text: Path | None,
    say: Say,
    which: Which = "trained",
) -> Path:
    """Export a run's newest checkpoint, or a checkpoint folder, to `output`; returns `output`.

    `largest_shard` is in bytes. The models are compared on `text`, by default pages of Python's own documentation. UserError
    if the model cannot be exported exactly; then nothing is left behind.
    """
    check_new_folder(output)
    words, source = _text(text), read_source(checkpoint, kind, which)
    tokens_BS, plan = _tokens(source, words), make_plan(source, kind)
    say(f"reads   {source.folder}")
    say(f"weights {source.weights.label}")
    say(f"format  {plan.kind}, {plan.architecture}, {_heads(source, plan)}")
    try:
        with building_folder(output.resolve()) as folder:
            report = _write(source, plan, folder, largest_shard, tokens_BS)
    except OSError as error:
        reason = error.strerror or f"{error}; is the disk full?"
        raise UserError(f"{output}: cannot be written ({reason}); nothing was written") from error
    for name in ("float64", "float32"):
        difference = getattr(report, name)
        say(f"{name} logits differ by {difference.largest:.1e}, rounding may by {difference.allowed:.1e}")
    say(f"written {output}")
    say(f"load    {_how_to_load(plan, output)}")
    return output


def read_source(path: Path, kind: Format, which: Which = "trained") -> Source:
    """UserError unless `path` has a complete, undamaged checkpoint whose model can be written as `kind`."""
    try:
        folder = newest_checkpoint(path)
        verify(folder, COMMON_FILES)
        config = read_config(folder)
        fault = ability_fault(config.model.kind, "exports")
        if fault is not None:
            raise UserError(f"{folder}: {fault}")
        choose_form(config.model, kind)  # before all weights are read
        verify(folder, weight_files(folder, which))
    except OSError as error:  # such as a name that is too long, or a file that may not be read
        raise UserError(f"{path}: {error.strerror}") from error
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    rows = config.model.vocab_size
    assert rows is not None
    if tokenizer.vocab_size > rows:
        raise UserError(f"{folder / TOKENIZER}: has {tokenizer.vocab_size} ids, the model only {rows}: not its tokenizer")
    return Source(folder, config, Weights(folder, which), tokenizer, origin_of(folder.resolve(), config))


def choose_form(model: ModelConfig, kind: Format) -> tuple[Format, Match]:
    """The kind that is written, and the stock architecture if it is one.

    `auto` is a stock architecture if its cache is as small as the model's own, else our own class. UserError, which says what
    to change, if the model cannot be written as `kind`.
    """
    match = find_stock(model)
    if kind == "auto":
        stock_values = 2 * match.kv_heads * model.head_width * model.num_layers
        kind = "native" if match.stock is None or stock_values > kv_cache_bytes_per_token(model, bytes_per_value=1) else "stock"
    if kind != "native":
        _stock(match, kind)
    elif refusal := native.native_refusal(model):
        other = "" if match.stock else f"; nor is there a stock form: {match.reason}"
        raise UserError(f"--format {kind}: {refusal}{other}")
    return kind, match


def make_plan(source: Source, kind: Format) -> Plan:
    """How the checkpoint is written. UserError as `choose_form`."""
    model, tokenizer = source.config.model, source.tokenizer
    kind, match = choose_form(model, kind)
    length = model.max_position_embeddings or source.config.row_length
    ours = Shape(tokenizer.vocab_size, length, model.num_heads, model.num_heads)
    if kind == "native":
        return Plan(kind, None, ours)
    return Plan(kind, _stock(match, kind), replace(ours, heads=match.heads, kv_heads=match.kv_heads))


def _how_to_load(plan: Plan, output: Path) -> str:
    if plan.kind == "gguf":
        return f"llama-cli -m {output / 'model.gguf'}"
    own_code = "" if plan.stock else ", trust_remote_code=True"
    return f"AutoModelForCausalLM.from_pretrained({str(output)!r}{own_code}) of transformers, AutoTokenizer likewise"


def _stock(match: Match, kind: Format) -> StockArchitecture:
    if match.stock is None:
        raise UserError(f"--format {kind}: {match.reason}; or take --format native")
    refusal = gguf_refusal(match.stock) if kind == "gguf" else None
    if refusal is not None:
        raise UserError(f"--format {kind}: {refusal}; or take --format stock or native")
    return match.stock


def _heads(source: Source, plan: Plan) -> str:
    model, heads = source.config.model, plan.shape.heads
    if plan.stock is None:
        return f"{model.num_heads} heads, {kv_cache_bytes_per_token(model, bytes_per_value=1):,} cached values of a token"
    more = f", filled up with zeros to {heads}" if heads > model.num_heads else ""
    return f"{model.num_heads} heads on {plan.shape.kv_heads} of keys and values{more}"


def _text(path: Path | None) -> str:
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or error})") from error


def _tokens(source: Source, words: str) -> Tensor:
    """(1, S): an end of document, then the text; documents begin like this in training."""
    longest = min(LONGEST, source.config.data.sequence_length, source.config.model.max_position_embeddings or LONGEST)
    ids = source.tokenizer.encode(words[: 32 * LONGEST])[: longest - 1]
    if len(ids) < longest - 1:
        raise UserError(f"--text: has {len(ids)} tokens, {longest - 1} are needed")
    return torch.tensor([[source.tokenizer.end_of_document, *ids]])


def _write(source: Source, plan: Plan, folder: Path, largest_shard: int, tokens_BS: Tensor) -> Equivalence:
    """Write all files, read them back and compare. Raises OSError."""
    settings, makes = _settings(source, plan), dict(_tensors(source, plan, source.weights))
    sizes = tensor_sizes(source.config.model, lambda read: _tensors(source, plan, read))
    if plan.kind == "gguf":
        written = _write_gguf(source, plan, folder, makes)
    else:
        written = read_shards(folder, write_shards(folder, makes, sizes, largest_shard))
        settings = _write_settings(source, plan, settings, folder)
    for name, make in makes.items():
        made = make().float()
        if not torch.isfinite(made).all():
            raise not_finite(source.folder, "weights")
        if name not in written or not torch.equal(written[name](), made):
            raise UserError(f"the exported model is not equal: {name} is not in the files as it was made; nothing was written")
    report = _compare(source, plan, settings, makes, written, tokens_BS)
    write_text(folder / "equivalence.json", json.dumps(asdict(report), indent=2) + "\n")
    count = sum(size.numel() for size in sizes.values())
    card = model_card(
        source.origin, source.config, source.weights.label, source.tokenizer, plan.kind, plan.architecture, count, report
    )
    write_text(folder / "README.md", card)
    return report


def _write_gguf(source: Source, plan: Plan, folder: Path, makes: Mapping[str, Make]) -> dict[str, Make]:
    """Write the file for llama.cpp. Returns functions that read its tensors."""
    assert plan.stock is not None
    path, model, tokenizer = folder / "model.gguf", source.config.model, source.tokenizer
    write_gguf(
        path,
        plan.stock,
        model,
        plan.shape,
        source.weights,
        tokenizer.text,
        tokenizer.end_of_document,
        source.origin.name,
    )
    return read_gguf(path, plan.stock, model, makes)


def _settings(source: Source, plan: Plan) -> Any:
    """The configuration as a transformers object."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    model = source.config.model
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), source.tokenizer.end_of_document)
    if plan.stock is None:
        native.register()
        settings: Any = native.native_config(model, plan.shape, **ends)
    else:
        settings = AutoConfig.for_model(plan.stock.name, **plan.stock.settings(model, plan.shape), **ends)
        stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
        settings.architectures = [stock_class.__name__]
    settings.dtype = "float32"
    return settings


def _tensors(source: Source, plan: Plan, read: Read) -> Named:
    """Every tensor of the exported model with the function that makes it."""
    model = source.config.model
    return plan.stock.tensors(model, read, plan.shape) if plan.stock else native.native_tensors(model, read, plan.shape)


def _write_settings(source: Source, plan: Plan, settings: Any, folder: Path) -> Any:
    """Write all files of transformers except the weights. Returns the configuration read back."""
    from transformers import AutoConfig, GenerationConfig

    if plan.stock is None:
        for path in native.CODE_FILES:
            shutil.copyfile(path, folder / path.name)
    settings.save_pretrained(folder)
    end = source.tokenizer.end_of_document
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(folder)
    _write_tokenizer(source, plan, folder)
    return AutoConfig.from_pretrained(folder)


def _write_tokenizer(source: Source, plan: Plan, folder: Path) -> None:
    """UserError if transformers' tokenizer gives other ids than ours."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    write_text(folder / TOKENIZER, source.tokenizer.text)
    end = source.tokenizer.end_of_document
    marker = source.tokenizer.decode([end])
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / TOKENIZER),
        bos_token=marker,
        eos_token=marker,
        pad_token=marker,
        padding_side="left",  # for generation
        model_max_length=plan.shape.length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    written = AutoTokenizer.from_pretrained(folder)
    for probe in PROBES:
        text = probe.replace(marker, "")  # which transformers reads as the token, our commands as text
        if written(text, add_special_tokens=False, verbose=False)["input_ids"] != source.tokenizer.encode(text):
            raise UserError(f"{source.folder / TOKENIZER}: transformers gives other ids for {text[:40]!r}; nothing was written")


def _compare(
    source: Source, plan: Plan, settings: Any, makes: Mapping[str, Make], written: Mapping[str, Make], tokens_BS: Tensor
) -> Equivalence:
    model = source.config.model
    blocks = plan.stock.blocks if plan.stock else "model.blocks"

    def ours(dtype: torch.dtype) -> Tensor:
        logits_BSV = our_logits(model, source.weights, tokens_BS, dtype)
        if not torch.isfinite(logits_BSV).all():
            raise not_finite(source.folder, "logits")
        return logits_BSV

    def theirs(dtype: torch.dtype) -> Tensor:
        return stock_logits(settings, blocks, makes if dtype == torch.float64 else written, tokens_BS, dtype)

    wide = plan.stock is None or plan.stock.wide
    return compare(tokens_BS.numel(), ours, theirs, plan.shape.vocab_size, wide)
