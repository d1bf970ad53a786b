"""README.md of an exported model: what it is, its training data, how far it was trained, how to load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.schema import Config, SourceConfig
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.manifest import Manifest, manifest_sha256, read_manifest
from model.costs.parameters import parameters
from pretrain.checkpoints.folder import CHECKPOINTS, read_state
from pretrain.interop.equivalence import Equivalence

METRICS = ("loss", "validation/loss", "validation/perplexity", "validation/bits_per_byte")
TASKS = "tasks/"  # the beginning of the names of tasks' figures


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: its run's name, its step, and rows for the card's table."""

    name: str
    step: int
    lines: dict[str, str]


def origin_of(checkpoint: Path, config: Config) -> Origin:
    """Read the origin from the files of a verified checkpoint and its run; `checkpoint` is a full path."""
    state = read_state(checkpoint)
    in_run = checkpoint.parent.name == CHECKPOINTS
    figures = _metrics(checkpoint.parent.parent / "metrics.jsonl", state.step) if in_run else {}
    name = checkpoint.parent.parent.name if in_run else checkpoint.name
    merged = {
        f"merged from {number}": f"`{one.checkpoint}`, weight {one.weight:.3g}, trained on {', '.join(one.data)}"
        for number, one in enumerate(state.merged, start=1)
    }
    one_data = all(one.data == state.merged[0].data for one in state.merged)
    data = _data(config, state.data_sha256) if one_data else {}  # config and hash are of the first checkpoint
    return Origin(name, state.step, figures | merged | data)


def model_card(
    origin: Origin,
    config: Config,
    weights: str,
    tokenizer: Tokenizer,
    kind: str,
    architecture: str,
    exported: int,
    report: Equivalence,
) -> str:
    """The card in Markdown, with the header that model hubs read.

    `weights` says which of the checkpoint's they are. `exported` counts the parameters in the files.
    """
    model = config.model
    counts = parameters(model)
    tokens = origin.step * config.training.global_batch_size * config.data.sequence_length
    rows = {
        "attention": f"`{model.attention_words}`, {model.num_heads} heads of width {model.head_width}",
        "layers": f"{model.num_layers} of width {model.hidden_size}, MLP {model.ffn_width} ({model.activation}), {model.norm}",
        "positions": model.position,
        "vocabulary": f"{tokenizer.vocab_size:,} ids (byte-level BPE)",
        "parameters as trained": f"{sum(counts.values()):,}, of attention {counts['attention']:,}",
        "parameters in the files": f"{exported:,}",
        "trained": f"{origin.step:,} of {config.training.steps:,} steps, {tokens:,} tokens, {config.training.precision}",
        "weights": weights if weights == "trained" else f"{weights}; losses of the run are those of its trained weights",
        **origin.lines,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    differences = "; ".join(
        f"{dtype} {getattr(report, dtype).largest:.1e} (rounding: {getattr(report, dtype).allowed:.1e})"
        for dtype in ("float64", "float32")
    )
    return f"""---
library_name: {"gguf" if kind == "gguf" else "transformers"}
pipeline_tag: text-generation
---

# {origin.name}

A language model pretrained with manyheads, exported as `{architecture}`.

| | |
|---|---|
{table}

## Load

{_load(kind)}

Documents begin after `{tokenizer.decode([tokenizer.end_of_document])}` in training: put it before a prompt that begins one.

## Equal to the checkpoint

Largest difference of logits from the checkpoint's on {report.tokens} tokens of text: {differences}.
The largest logit is {report.largest_logit:.3g}.{_LLAMA_CPP if kind == "gguf" else ""}
"""


_LLAMA_CPP = """
Measured with the file's weights in transformers' architecture; llama.cpp rounds keys, values and GELU in its own way."""


def _load(kind: str) -> str:
    if kind == "gguf":
        return '```\nllama-cli -m model.gguf -p "Once upon a time"\n```'
    trust = ", trust_remote_code=True" if kind == "native" else ""
    return f"""With transformers 5 or later:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
inputs = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""


def _metrics(path: Path, step: int) -> dict[str, str]:
    """The last value of each metric up to the checkpoint's step; empty if the run's metrics cannot be read."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # half a line of a run that was killed
        if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= step:
            shown = [name for name in line if name in METRICS or name.startswith(TASKS)]
            numbers = {name: line[name] for name in shown if isinstance(line[name], (int, float))}
            found |= {name.replace("/", " "): f"{value:.4g}" for name, value in numbers.items()}
    return found


def _data(config: Config, sha256: str) -> dict[str, str]:
    sources = config.data.parts
    if config.data.streams:
        return {"data": f"streamed from {', '.join(config.data.stream.input)}; SHA-256 of the list of files {sha256}"}
    if len(sources) == 1:
        return _part(sources[0], sha256)
    lines: dict[str, str] = {}
    for source, own in zip(sources, sha256.split(","), strict=True):
        lines |= {f"{name} {source.label}": text for name, text in _part(source, own).items()}
    return lines


def _part(source: SourceConfig, sha256: str) -> dict[str, str]:
    manifest = _manifest(Path(source.path), sha256)
    if manifest is None:
        return {"data": f"`{source.path}`, SHA-256 of its manifest {sha256}"}
    train = manifest.splits["train"]
    sources = ", ".join(f"{source.kind} `{Path(source.path).name}`" for source in manifest.sources)
    size = f"{train.documents:,} documents, {train.tokens:,} tokens, {train.text_bytes:,} bytes"
    return {
        "data": f"{sources}; for training {size}",
        "data manifest": f"SHA-256 {sha256}",
    }


def _manifest(folder: Path, sha256: str) -> Manifest | None:
    """The manifest of the training data; None if it is gone or has changed."""
    try:
        return read_manifest(folder) if manifest_sha256(folder) == sha256 else None
    except (UserError, OSError):
        return None
