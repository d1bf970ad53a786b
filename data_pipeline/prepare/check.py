"""Check the content of prepared folders: every file, every id, every bound of a document. All faults are found in one go."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from configs.errors import UserError
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.bounds import Bounds, bounds_faults
from data_pipeline.read.manifest import (
    SPLITS,
    TOKEN_COUNTS,
    TOKENIZER,
    FileRecord,
    Manifest,
    file_record,
    read_manifest,
)
from data_pipeline.read.orders import NAME, order_faults
from data_pipeline.read.sound import AGAIN, every

CHUNK = 1 << 20  # bytes that are looked at together


def check_folders(folders: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder with its faults, as soon as it is checked."""
    for folder in folders:
        try:
            yield folder, list(_faults(folder))
        except UserError as error:  # no folder, or no manifest that can be read
            yield folder, [str(error).removeprefix(f"{folder}: ")]
        except OSError as error:
            yield folder, [f"{error.filename or folder} cannot be read: {error.strerror}"]


def _faults(folder: Path) -> Iterator[str]:
    manifest = read_manifest(folder)
    yield from _file_faults(folder / TOKEN_COUNTS, manifest.token_counts)
    yield from _tokenizer_faults(folder, manifest)
    for name in SPLITS:
        record = manifest.splits.get(name)
        if record is None:
            if manifest.split_ratios.get(name):
                yield f"split {name} has a share but is not there; run launch/prepare.py again"
            continue
        if record.documents == 0:
            yield f"split {name} is empty; run launch/prepare.py with a larger share"
        yield from _split_faults(folder, name, manifest)
    yield from _index_faults(folder, manifest)
    yield from _disk_faults(folder, manifest)


def _file_faults(path: Path, record: FileRecord, look_at: Callable[[bytes], None] | None = None) -> Iterator[str]:
    """Size and hash; `look_at` is given all bytes on the way."""
    if not path.is_file():
        yield f"{path.name} is missing; {AGAIN}"
        return
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while content := file.read(CHUNK):
            digest.update(content)
            size += len(content)
            if look_at is not None:
                look_at(content)
    if size != record.bytes:
        yield f"{path.name} has {size} bytes instead of {record.bytes}; {AGAIN}"
    elif digest.hexdigest() != record.sha256:
        yield f"{path.name} is damaged (its sha256 differs from the manifest's); {AGAIN}"


def _tokenizer_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    path = folder / TOKENIZER
    if not path.is_file():
        yield f"{TOKENIZER} is missing; {AGAIN}"
        return
    if file_record(path).sha256 != manifest.tokenizer_sha256:
        yield f"{TOKENIZER} is not the one the tokens were made with (its sha256 differs from the manifest's)"
        return
    tokenizer = Tokenizer.load(path)
    if (tokenizer.vocab_size, tokenizer.end_of_document) != (manifest.vocab_size, manifest.end_of_document):
        found = f"{tokenizer.vocab_size} ids, end of a document {tokenizer.end_of_document}"
        yield f"{TOKENIZER} has {found}, the manifest {manifest.vocab_size} and {manifest.end_of_document}"


def _split_faults(folder: Path, name: str, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files of a split, and, whatever their hashes say, with its ids and documents."""
    record, tokens, index = manifest.splits[name], folder / f"{name}.bin", folder / f"{name}.idx"
    ids = _Ids(manifest)
    yield from _file_faults(tokens, record.bin, ids.look_at)
    yield from _file_faults(index, record.idx)
    if not tokens.is_file() or not index.is_file():
        return
    faults = list(bounds_faults(index, manifest.dtype, record.documents, record.tokens, every(record.documents)))
    yield from (f"{index.name}: {fault}; {AGAIN}" for fault in faults)
    if faults or tokens.stat().st_size != record.tokens * np.dtype(manifest.dtype).itemsize:
        return  # of another size: said already
    if ids.outside:
        yield f"{tokens.name} has {ids.outside:,} ids outside the vocabulary of {manifest.vocab_size:,}; {AGAIN}"
    ends = np.cumsum(Bounds.of(index, record.documents).lengths, dtype=np.int64) - 1
    without_end = int((np.memmap(tokens, manifest.dtype, "r")[ends] != manifest.end_of_document).sum()) if ends.size else 0
    if without_end:
        yield f"{tokens.name}: {without_end:,} documents do not end with id {manifest.end_of_document}; {AGAIN}"
    counted = folder / TOKEN_COUNTS
    if name == "train" and counted.is_file() and not _equals(counted, ids.counts[: manifest.vocab_size]):
        yield f"{TOKEN_COUNTS} does not count the ids of {tokens.name}; {AGAIN}"


class _Ids:
    """Counts the ids of a token file while it is hashed, so that it is read once."""

    def __init__(self, manifest: Manifest) -> None:
        self._dtype, self._vocab_size = np.dtype(manifest.dtype), manifest.vocab_size
        self.counts = np.zeros(max(self._vocab_size, 1 << 16), np.int64)
        self.outside = 0

    def look_at(self, content: bytes) -> None:
        """The next bytes of the file."""
        ids = np.frombuffer(content, self._dtype, len(content) // self._dtype.itemsize)
        if self._dtype.itemsize > 2:  # of two bytes none is below 0 or above the counts
            ids = ids[(ids >= 0) & (ids < self._vocab_size)]
            self.outside += len(content) // self._dtype.itemsize - ids.size
        counts = np.bincount(ids, minlength=len(self.counts))
        self.outside += int(counts[self._vocab_size :].sum())
        self.counts += counts


def _equals(path: Path, expected: np.ndarray) -> bool:
    try:
        return bool(np.array_equal(np.load(path), expected))
    except (ValueError, OSError, EOFError):
        return False


def _index_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Of the orders of samples that runs have left."""
    for place in sorted((folder / "index").glob("*")):
        found = NAME.fullmatch(place.name)
        split = found["split"] if found else None
        record, index = manifest.splits.get(split or ""), folder / f"{split}.idx"
        if record is None or not index.is_file():
            continue
        if any(bounds_faults(index, manifest.dtype, record.documents, record.tokens, every(record.documents))):
            continue  # said already
        lengths = Bounds.of(index, record.documents).lengths
        for fault in order_faults(place, lengths, every):
            yield f"{place.relative_to(folder)}: {fault}; delete {place}, the next run makes it again"


def _disk_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A run writes an index: 4 bytes for a document, and 12 for a sample, of 128 tokens or more."""
    train = manifest.splits.get("train")
    needed = 0 if train is None else 4 * train.documents + 12 * (train.tokens // 128)
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield f"the disk has {free / 1e6:,.0f} MB left, the index of an epoch may need {needed / 1e6:,.0f} MB; free some"
