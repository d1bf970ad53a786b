"""Section `data`: the prepared tokens and the length of a sample."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import PathText, Section


class DataConfig(Section):
    path: PathText = Field(
        min_length=1, description="Folder written by launch/prepare.py: token files, tokenizer.json, manifest.json"
    )
    sequence_length: int = Field(ge=1, le=2**24, description="Tokens per training sample")
