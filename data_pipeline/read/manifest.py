"""The manifest of a prepared folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from configs.durable import write_text
from configs.errors import UserError
from data_pipeline.folder import MANIFEST

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
TOKENIZER, TOKEN_COUNTS = "tokenizer.json", "token_counts.npy"


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """One input. `bytes` and `sha256` cover its documents' UTF-8 texts in order; the hash takes each text after its length."""

    kind: str
    path: str  # as given to the command
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitRecord:
    documents: int
    tokens: int  # including the end-of-document id after each document
    text_bytes: int  # UTF-8
    bin: FileRecord
    idx: FileRecord

    def samples(self, sequence_length: int) -> int:
        """Samples of one epoch: every token but the first is a label once; a remainder shorter than a sample is dropped."""
        return max(0, self.tokens - 1) // sequence_length


@dataclass(frozen=True)
class Manifest:
    format_version: int
    tool_version: str
    seed: int
    split_ratios: dict[str, float]
    sources: list[SourceRecord]
    skipped: dict[str, int]  # skipped documents by reason
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: int
    dtype: Literal["uint16", "int32"]  # of the ids in .bin
    token_counts: FileRecord
    splits: dict[str, SplitRecord]  # only those with a share above 0

    def has(self, split: str) -> bool:
        """Whether the split has any document."""
        return split in self.splits and self.splits[split].documents > 0


def file_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder. UserError if it is missing or this version cannot read it."""
    manifest = manifest_or_reason(Path(folder))
    if isinstance(manifest, str):
        raise UserError(f"{folder}: {manifest}")
    return manifest


def manifest_sha256(folder: str | Path) -> str:
    """The hash that identifies the data: other inputs, options or another tokenizer give another one."""
    return file_record(Path(folder) / MANIFEST).sha256


def manifest_or_reason(folder: Path) -> Manifest | str:
    """The manifest of a prepared folder, or why there is none."""
    if not folder.is_dir():
        return "no such folder; launch/prepare.py makes one"
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return f"has no {MANIFEST}, so it is no prepared folder; launch/prepare.py makes one"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    try:
        tree = json.loads(content)
        if isinstance(tree, dict) and tree.get("format_version") != FORMAT_VERSION:
            found = tree.get("format_version")
            return f"{MANIFEST} has format version {found}, this program reads {FORMAT_VERSION}; run launch/prepare.py again"
        return _checked().validate_python(tree)
    except (ValueError, ValidationError):
        return f"{MANIFEST} is damaged; run launch/prepare.py again"


@cache
def _checked() -> TypeAdapter[Manifest]:
    """Made once: it takes longer than to read a manifest."""
    return TypeAdapter(Manifest)
