"""The .idx beside a token file, in Megatron's format: the length of each document and where it begins. Torch-free."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CODES = {"int32": 4, "uint16": 8}  # how the file names the type of the ids
MAGIC = b"MMIDIDX\0\0"
HEADER = struct.calcsize("<9sQBQQ")


def index_header(dtype: str, documents: int) -> bytes:
    """Magic, version, type of the ids, number of sequences (one for each document) and of document bounds."""
    return struct.pack("<9sQBQQ", MAGIC, 1, CODES[dtype], documents, documents + 1)


@dataclass(frozen=True)
class Bounds:
    """The arrays of an .idx, mapped into memory."""

    lengths: np.ndarray  # int32 [documents], in tokens
    starts: np.ndarray  # int64 [documents], in bytes of the .bin
    numbers: np.ndarray  # int64 [documents + 1]: 0, 1, 2, … as each document is one sequence

    @classmethod
    def of(cls, path: Path, documents: int) -> Bounds:
        """Those of a file that has `documents` documents and the size for them."""
        content = np.memmap(path, np.uint8, "r", HEADER)
        ends = (4 * documents, 12 * documents, 12 * documents + 8 * (documents + 1))
        lengths, starts, numbers = content[: ends[0]], content[ends[0] : ends[1]], content[ends[1] : ends[2]]
        return cls(lengths.view("<i4"), starts.view("<i8"), numbers.view("<i8"))


def index_size(documents: int) -> int:
    return HEADER + 12 * documents + 8 * (documents + 1)


def bounds_faults(path: Path, dtype: str, documents: int, tokens: int, places: Sequence[slice]) -> Iterator[str]:
    """What is wrong with an .idx of `documents` documents: its header, the sum of all lengths, the documents at `places`."""
    with path.open("rb") as file:
        if file.read(HEADER) != index_header(dtype, documents):
            yield "is not of the kind or number of documents that the manifest says"
            return
    if path.stat().st_size != index_size(documents):
        yield "is cut off, or too long"
        return
    bounds, itemsize = Bounds.of(path, documents), np.dtype(dtype).itemsize
    if documents and (int(bounds.lengths.min()) < 1 or int(bounds.lengths.sum(dtype=np.int64)) != tokens):
        yield f"the lengths of its documents do not add up to the {tokens:,} tokens of the manifest"
        return
    before = seen = 0  # tokens and documents before a place
    for place in places:
        before += int(bounds.lengths[seen : place.start].sum(dtype=np.int64))
        seen = place.start
        lengths = bounds.lengths[place].astype(np.int64)
        if not np.array_equal(bounds.starts[place], (before + np.cumsum(lengths) - lengths) * itemsize):
            yield "documents do not begin where the one before ends"
            return
    for place in places:
        numbers = bounds.numbers[place.start : place.stop + 1]
        if not np.array_equal(numbers, np.arange(place.start, place.start + len(numbers))):
            yield "the bounds of its documents are not in order"
            return
