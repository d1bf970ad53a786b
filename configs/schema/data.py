"""Section `data`: the prepared tokens and the length of a sample."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import PathText, Section


class DataConfig(Section):
    path: PathText = Field(
        min_length=1, description="Folder written by launch/prepare.py: token files, tokenizer.json, manifest.json"
    )
    sequence_length: int = Field(ge=1, le=2**24, description="Tokens per training sample")
    packing: Literal["concatenate", "documents", "best_fit"] = Field(
        "concatenate",
        description="What a sample holds. concatenate: the next sequence_length tokens of the shuffled text; documents: the "
        "same, but each document is computed as if alone and its first token is no label; best_fit: complete documents that "
        "together fill a sample best, apart as well; only longer ones are split (docs/packing.md)",
    )

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether a document is trained on as if it were alone in its sample."""
        return self.packing != "concatenate"
