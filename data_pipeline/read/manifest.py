"""The manifest of a prepared folder, and the cheap checks that run before torch is imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from configs.durable import write_text
from configs.errors import UserError
from configs.packages import lacks
from configs.schema import DataConfig, Fault, ModelConfig, Section, ValidationConfig, validation_sets
from configs.schema.validation import UNNAMED
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


def file_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder. UserError if it is missing or this version cannot read it."""
    manifest = _manifest_or_reason(Path(folder))
    if isinstance(manifest, str):
        raise UserError(f"{folder}: {manifest}")
    return manifest


def manifest_sha256(folder: str | Path) -> str:
    """The hash that identifies the data: other inputs, options or another tokenizer give another one."""
    return file_record(Path(folder) / MANIFEST).sha256


def folder_faults(folder: str | Path, manifest: Manifest, splits: Sequence[str]) -> Iterator[str]:
    """What keeps `splits` from being read: a missing package, or files and a tokenizer that differ from the manifest."""
    if why := lacks("megatron-core"):
        yield f"reading it {why}"
    expected = {TOKEN_COUNTS: manifest.token_counts.bytes}
    for split in splits:
        if split in manifest.splits:
            record = manifest.splits[split]
            expected |= {f"{split}.bin": record.bin.bytes, f"{split}.idx": record.idx.bytes}
    for name, size in expected.items():
        path = Path(folder) / name
        if not path.is_file():
            yield f"{name} is missing; copy it again or run launch/prepare.py"
        elif path.stat().st_size != size:
            found = path.stat().st_size
            yield f"{name} has {found} bytes instead of {size}, so it is truncated; copy it again or run launch/prepare.py"
    tokenizer = Path(folder) / TOKENIZER
    if not tokenizer.is_file():
        yield f"{TOKENIZER} is missing; copy it again or run launch/prepare.py"
    elif file_record(tokenizer).sha256 != manifest.tokenizer_sha256:
        yield f"{TOKENIZER} is not the one the tokens were made with (sha256 differs from {MANIFEST})"


def data_faults(sections: Mapping[str, Section], splits: Sequence[str] = ("train", "valid")) -> list[Fault]:
    """Faults of the data and of the validation sets; does not read the tokens.

    Checked against those `sections` that are valid by themselves. `splits`: what is needed of `data.path`; `valid` is not
    where validation sets are named.
    """
    data, model, validation = sections.get("data"), sections.get("model"), sections.get("validation")
    if not isinstance(data, DataConfig):
        return []
    sets = validation_sets(data, validation if isinstance(validation, ValidationConfig) else ValidationConfig())
    named = {name: path for name, path in sets.items() if name != UNNAMED}
    folder, length = data.path, data.sequence_length
    manifest = _manifest_or_reason(Path(folder))
    of_sets = [fault for name, path in named.items() for fault in _set_faults(name, path, data, manifest)]
    if isinstance(manifest, str):
        return [Fault("data.path", folder, manifest), *of_sets]
    splits = [split for split in splits if split != "valid" or UNNAMED in sets]
    faults = [Fault("data.path", folder, reason) for reason in folder_faults(folder, manifest, splits)]
    for split in splits:
        record = manifest.splits.get(split)
        if record is None or record.documents == 0:
            reason = f"has no documents in split {split}; give it a share in --split of launch/prepare.py"
            faults.append(Fault("data.path", folder, reason))
        elif record.tokens <= length:
            reason = f"at most {record.tokens - 1}: split {split} has {record.tokens} tokens; or prepare more text"
            faults.append(Fault("data.sequence_length", length, reason))
    vocab_size = model.vocab_size if isinstance(model, ModelConfig) else None
    if vocab_size is not None and vocab_size < manifest.vocab_size:
        faults.append(Fault("model.vocab_size", vocab_size, f"at least the tokenizer's size ({manifest.vocab_size}), or null"))
    return faults + of_sets


def _set_faults(name: str, folder: str, data: DataConfig, of_data: Manifest | str) -> Iterator[Fault]:
    """Faults of the validation set `name`; `of_data` is the manifest of the data that the run trains on."""
    key, length, manifest = f"validation.sets.{name}", data.sequence_length, _manifest_or_reason(Path(folder))
    if isinstance(manifest, str):
        yield Fault(key, folder, manifest)
        return
    for reason in folder_faults(folder, manifest, ["valid"]):
        yield Fault(key, folder, reason)
    if isinstance(of_data, Manifest) and manifest.tokenizer_sha256 != of_data.tokenizer_sha256:
        again = f"prepare it with --tokenizer {data.path}/{TOKENIZER}"
        yield Fault(key, folder, f"was prepared with another tokenizer than data.path; {again}")
    record = manifest.splits.get("valid")
    if record is None or record.documents == 0:
        yield Fault(key, folder, "has no documents in split valid; give it a share in --split of launch/prepare.py")
    elif record.tokens <= length:
        reason = f"its split valid has {record.tokens} tokens, too few for data.sequence_length ({length}) + 1"
        yield Fault(key, folder, f"{reason}; prepare more text")


def _manifest_or_reason(folder: Path) -> Manifest | str:
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
        return TypeAdapter(Manifest).validate_python(tree)
    except (ValueError, ValidationError):
        return f"{MANIFEST} is damaged; run launch/prepare.py again"
