"""Whether a prepared folder has what its manifest says. Torch-free.

A run checks this before it starts: sizes, the hashes of files up to 64 MB, and of larger ones a sample. `launch/prepare.py
check` looks at every byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from configs.packages import lacks
from data_pipeline.folder import MANIFEST
from data_pipeline.read.bounds import Bounds, bounds_faults
from data_pipeline.read.manifest import TOKEN_COUNTS, TOKENIZER, FileRecord, Manifest, file_record

HASHED_BYTES = 64 << 20  # files up to this size are hashed
PLACES, PLACE = 64, 4096  # of larger ones, so many places are looked at, so many entries at each
AGAIN = "copy it again or run launch/prepare.py"


def sampled(size: int) -> list[slice]:
    """Places spread over `size` entries, with the first and the last; all entries if there are few."""
    if size <= PLACES * PLACE:
        return [slice(0, size)] if size else []
    return [slice(start, start + PLACE) for start in map(int, np.linspace(0, size - PLACE, PLACES))]


def every(size: int) -> list[slice]:
    """All of `size` entries, as one place."""
    return [slice(0, size)] if size else []


def folder_faults(folder: str | Path, manifest: Manifest, splits: Sequence[str]) -> Iterator[str]:
    """What keeps `splits` from being read: a missing package, or files and a tokenizer that differ from the manifest."""
    if why := lacks("megatron-core"):
        yield f"reading it {why}"
    folder = Path(folder)
    yield from _file_faults(folder / TOKEN_COUNTS, manifest.token_counts)
    for split in splits:
        if split in manifest.splits:
            record = manifest.splits[split]
            faults = [
                *_file_faults(folder / f"{split}.bin", record.bin),
                *_file_faults(folder / f"{split}.idx", record.idx),
            ]
            yield from faults or _content_faults(folder, split, manifest)
    tokenizer = folder / TOKENIZER
    if not tokenizer.is_file():
        yield f"{TOKENIZER} is missing; {AGAIN}"
    elif file_record(tokenizer).sha256 != manifest.tokenizer_sha256:
        yield f"{TOKENIZER} is not the one the tokens were made with (sha256 differs from {MANIFEST})"


def _file_faults(path: Path, record: FileRecord) -> Iterator[str]:
    """Size and, of small files, hash."""
    name = path.name
    try:
        if not path.is_file():
            yield f"{name} is missing; {AGAIN}"
        elif (size := path.stat().st_size) != record.bytes:
            yield f"{name} has {size} bytes instead of {record.bytes}, so it is truncated; {AGAIN}"
        elif size <= HASHED_BYTES and _hashed(path) != record.sha256:
            yield f"{name} is damaged (its sha256 differs from that in {MANIFEST}); {AGAIN}"
    except OSError as error:
        yield f"{name} cannot be read: {error.strerror}"


def _hashed(path: Path) -> str:
    """The hash of a file, which a run needs before it starts and when it opens the file."""
    now = path.stat()
    return _hash_of(os.path.abspath(path), now.st_ino, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_of(path: str, *_version: int) -> str:
    return file_record(Path(path)).sha256


def _content_faults(folder: Path, split: str, manifest: Manifest) -> Iterator[str]:
    """What a sample of documents and ids shows, in files of the right sizes."""
    record, path = manifest.splits[split], folder / f"{split}.bin"
    if record.bin.bytes != record.tokens * np.dtype(manifest.dtype).itemsize:
        yield f"{MANIFEST} is damaged ({path.name} cannot have {record.tokens:,} tokens); {AGAIN}"
        return
    documents = sampled(record.documents)
    faults = list(bounds_faults(folder / f"{split}.idx", manifest.dtype, record.documents, record.tokens, documents))
    yield from (f"{split}.idx is damaged ({fault}); {AGAIN}" for fault in faults)
    if record.tokens == 0:
        return
    ids = np.memmap(path, manifest.dtype, "r")
    for place in sampled(ids.size):
        if int(ids[place].max()) >= manifest.vocab_size or int(ids[place].min()) < 0:
            yield f"{path.name} is damaged (it has ids outside the vocabulary of {manifest.vocab_size}); {AGAIN}"
            return
    if faults:
        return
    bounds = Bounds.of(folder / f"{split}.idx", record.documents)
    for place in documents:
        ends = bounds.starts[place] // ids.itemsize + bounds.lengths[place] - 1
        if (ids[ends] != manifest.end_of_document).any():
            yield f"{path.name} is damaged (documents do not end with id {manifest.end_of_document}); {AGAIN}"
            return
