"""Check the content of prepared folders: every file, every id, every bound of a document. All faults are found in one go."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from configs.errors import UserError
from data_pipeline.prepare.token_writer import index_header
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.manifest import (
    SPLITS,
    TOKEN_COUNTS,
    TOKENIZER,
    FileRecord,
    Manifest,
    SplitRecord,
    file_record,
    read_manifest,
)
from data_pipeline.read.pack import split_documents
from data_pipeline.read.packed import NAMES as PACKED

CHUNK = 1 << 24  # ids that are looked at together
AGAIN = "copy it again or run launch/prepare.py"


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
        yield from _file_faults(folder / f"{name}.bin", record.bin)
        yield from _file_faults(folder / f"{name}.idx", record.idx)
        yield from _content_faults(folder, name, record, manifest)
    yield from _index_faults(folder)
    yield from _disk_faults(folder, manifest)


def _file_faults(path: Path, record: FileRecord) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name} is missing; {AGAIN}"
        return
    found = file_record(path)
    if found.bytes != record.bytes:
        yield f"{path.name} has {found.bytes} bytes instead of {record.bytes}; {AGAIN}"
    elif found != record:
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


def _content_faults(folder: Path, name: str, record: SplitRecord, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the ids and the bounds of documents, whatever the hashes say."""
    tokens, index = folder / f"{name}.bin", folder / f"{name}.idx"
    if not tokens.is_file() or not index.is_file():
        return
    lengths = _lengths(index, record, manifest.dtype)
    if isinstance(lengths, str):
        yield f"{index.name}: {lengths}; {AGAIN}"
        return
    dtype = np.dtype(manifest.dtype)
    if tokens.stat().st_size != record.tokens * dtype.itemsize:
        return  # said already
    ids = np.memmap(tokens, dtype=dtype, mode="r")
    ends = np.cumsum(lengths, dtype=np.int64) - 1
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    outside = 0
    for start in range(0, ids.size, CHUNK):
        chunk = np.asarray(ids[start : start + CHUNK]).astype(np.int64)
        valid = (chunk >= 0) & (chunk < manifest.vocab_size)
        outside += int(chunk.size - valid.sum())
        counts += np.bincount(chunk[valid], minlength=manifest.vocab_size)
    if outside:
        yield f"{tokens.name} has {outside:,} ids outside the vocabulary of {manifest.vocab_size:,}; {AGAIN}"
    without_end = int((ids[ends] != manifest.end_of_document).sum())
    if without_end:
        yield f"{tokens.name}: {without_end:,} documents do not end with id {manifest.end_of_document}; {AGAIN}"
    counted = folder / TOKEN_COUNTS
    if name == "train" and counted.is_file() and not _equals(counted, counts):
        yield f"{TOKEN_COUNTS} does not count the ids of {tokens.name}; {AGAIN}"


def _equals(path: Path, expected: np.ndarray) -> bool:
    try:
        return bool(np.array_equal(np.load(path), expected))
    except (ValueError, OSError, EOFError):
        return False


def _lengths(path: Path, record: SplitRecord, dtype: str) -> np.ndarray | str:
    """Lengths of all documents out of an .idx, or what is wrong with it."""
    header = index_header(dtype, record.documents)
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return "is not of the kind or number of documents that the manifest says"
        lengths = np.fromfile(file, np.int32, record.documents)
        starts = np.fromfile(file, np.int64, record.documents)
        bounds = np.fromfile(file, np.int64)
    if (lengths.size, starts.size, bounds.size) != (record.documents, record.documents, record.documents + 1):
        return "is cut off, or too long"
    if (lengths < 1).any() or int(lengths.sum(dtype=np.int64)) != record.tokens:
        return f"the lengths of its documents do not add up to the {record.tokens:,} tokens of the manifest"
    ends = np.cumsum(lengths, dtype=np.int64)
    if not np.array_equal(starts, (ends - lengths) * np.dtype(dtype).itemsize):
        return "documents do not begin where the one before ends"
    return (
        lengths if np.array_equal(bounds, np.arange(record.documents + 1)) else "the bounds of its documents are not in order"
    )


def _index_faults(folder: Path) -> Iterator[str]:
    """Of the orders of samples that runs have left: each takes every document, or piece of one, and every sample once."""
    for place in sorted((folder / "index").glob("*")):
        advice = f"delete {place}, the next run makes it again"
        orders: dict[str, np.ndarray] = {}
        for path in sorted(place.glob("*.npy")):
            try:
                order = np.load(path)
            except (ValueError, OSError, EOFError) as error:
                yield f"{path.relative_to(folder)} cannot be read ({error}); {advice}"
                continue
            kind = path.stem.rpartition("-")[2]
            orders[kind] = order
            if kind not in ("sample_index", *PACKED) and not np.array_equal(np.sort(order, axis=None), np.arange(order.size)):
                yield f"{path.relative_to(folder)} does not take everything once; {advice}"
        if {"document_index", "sample_index"} <= orders.keys() and not _follows(folder, place, orders):
            yield f"{place.relative_to(folder)}: samples do not follow each other in its sample_index.npy; {advice}"
        if orders.keys() >= set(PACKED) and not _packs(folder, place, orders):
            yield f"{place.relative_to(folder)}: its samples do not have each piece of a document once; {advice}"


def _lengths_of(folder: Path, place: Path) -> np.ndarray | None:
    """Lengths of the documents of an index's split; None if there is nothing sound to compare it with."""
    manifest = read_manifest(folder)
    split = next((name for name in manifest.splits if f"-{name}-" in place.name), None)
    if split is None or not (folder / f"{split}.idx").is_file():
        return None
    lengths = _lengths(folder / f"{split}.idx", manifest.splits[split], manifest.dtype)
    return None if isinstance(lengths, str) else lengths


def _packs(folder: Path, place: Path, orders: dict[str, np.ndarray]) -> bool:
    """True if the samples of best-fit packing hold each piece of each document once, and none more than it has room for."""
    lengths, capacity = _lengths_of(folder, place), re.search(r"-s(\d+)-seed", place.name)
    if lengths is None or capacity is None:
        return True
    pieces, (document, start, first) = split_documents(lengths, int(capacity[1])), (orders[name] for name in PACKED)
    if (document.shape, start.shape) != (pieces.document.shape, pieces.start.shape) or first.ndim != 1 or first.size < 2:
        return False
    taken = np.lexsort((start, document))  # the pieces themselves are in this order
    if not (np.array_equal(document[taken], pieces.document) and np.array_equal(start[taken], pieces.start)):
        return False
    if first[0] != 0 or first[-1] != document.size or (np.diff(first) < 1).any():
        return False
    sizes = np.empty_like(pieces.length)
    sizes[taken] = pieces.length
    return bool((np.add.reduceat(sizes, first[:-1]) <= int(capacity[1])).all())


def _follows(folder: Path, place: Path, orders: dict[str, np.ndarray]) -> bool:
    """True if sample s begins s samples' lengths after the beginning of the first document."""
    lengths = _lengths_of(folder, place)
    samples, documents = orders["sample_index"].astype(np.int64), orders["document_index"]
    if lengths is None or samples.ndim != 2 or len(samples) < 2:
        return True
    valid = (samples[:, 0] >= 0) & (samples[:, 0] < documents.size) & (samples[:, 1] >= 0)
    if not valid.all() or not ((documents >= 0) & (documents < lengths.size)).all():
        return False
    starts = np.concatenate([[0], np.cumsum(lengths[documents], dtype=np.int64)])[samples[:, 0]] + samples[:, 1]
    return bool((np.diff(starts) == starts[1]).all())


def _disk_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A run writes an index: 4 bytes for a document, and 12 for a sample, of 128 tokens or more."""
    train = manifest.splits.get("train")
    needed = 0 if train is None else 4 * train.documents + 12 * (train.tokens // 128)
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield f"the disk has {free / 1e6:,.0f} MB left, the index of an epoch may need {needed / 1e6:,.0f} MB; free some"
