"""A training sample as text for people: `launch/prepare.py inspect`."""

from __future__ import annotations

from pathlib import Path

from configs.schema import Config
from data_pipeline.mix.mixture import origin
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.manifest import TOKENIZER


def inspected(config: Config, number: int) -> str:
    """Where sample `number` of a run comes from, and its text."""
    found = origin(config, number)
    documents = ", ".join(f"{document:,}" for document in found.documents)
    taken = "left out" if found.step is None else f"taken in step {found.step + 1:,} (from_step {found.step})"
    if found.step is not None and found.step >= config.training.steps:
        taken = f"not taken: the run ends after {config.training.steps:,} steps"
    text = Tokenizer.load(Path(found.source.path) / TOKENIZER).decode(found.tokens.tolist())
    return (
        f"sample    {number:,}, {taken}\n"
        f"source    {found.source.label}: {found.source.path}\n"
        f"place     sample {found.number:,} of the source, in its epoch {found.epoch + 1}\n"
        f"documents {documents}\n"
        f"tokens    {len(found.tokens):,}\n\n{text}"
    )
