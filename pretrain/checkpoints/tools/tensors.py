"""Tensors of a checkpoint in any storage, with numpy: a block of rows at a time, so that memory is bounded. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pretrain.checkpoints.boxes import Ints
from pretrain.checkpoints.folder import DamagedError, parse_json
from pretrain.checkpoints.index import StoredTensor, part_name, rank_file, read_index
from pretrain.checkpoints.storage import Place, read_range, size_of

Array = NDArray[np.generic]
TYPES = {"F64": "<f8", "F32": "<f4", "BF16": "<u2", "I64": "<i8", "U8": "|u1"}  # numpy has no bfloat16: its bits
_LARGEST_HEADER = 10**8  # bytes; safetensors has this limit, too
BLOCK = 2**22  # values of a block of rows, unless one row has more


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]  # from the end of the header


@dataclass(frozen=True)
class Header:
    """What a file of tensors says it holds."""

    start: int  # where the values begin
    spans: dict[str, Span]


def read_header(path: Place) -> Header:
    """UserError unless the file is one in the safetensors format, of just the size that its tensors have."""
    size = size_of(path)
    if size is None:
        raise DamagedError(f"{path}: missing from the checkpoint")
    length = int.from_bytes(read_range(path, 0, 8), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise DamagedError(f"{path}: is no file of tensors (a header of {length:,} bytes in a file of {size:,})")
    entries = parse_json(str(path), read_range(path, 8, 8 + length), dict[str, Span | dict[str, str]])
    spans = {name: entry for name, entry in entries.items() if isinstance(entry, Span)}
    if others := entries.keys() - spans.keys() - {"__metadata__"}:
        raise DamagedError(f"{path}: is damaged ({min(others)!r} is no tensor)")
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1].data_offsets):
        begin, last = span.data_offsets
        if span.dtype not in TYPES or min(span.shape, default=0) < 0:
            raise DamagedError(f"{path}: is damaged ({name!r} is {span.dtype} {list(span.shape)})")
        if begin != end or last - begin != prod(span.shape) * np.dtype(TYPES[span.dtype]).itemsize:
            raise DamagedError(f"{path}: is damaged ({name!r} lies at {begin:,} to {last:,})")
        end = last
    if 8 + length + end != size:
        raise DamagedError(f"{path}: has {size:,} bytes, its tensors need {8 + length + end:,}")
    return Header(8 + length, spans)


class Tensors:
    """The tensors of a checkpoint's folder `engine`."""

    def __init__(self, engine: Place) -> None:
        """UserError for a damaged index."""
        self.engine, self.index = engine, read_index(engine)
        self._headers: dict[int, Header] = {}

    def entry(self, key: str) -> StoredTensor:
        """A tensor's entry in the index; UserError unless all its parts are in their files."""
        if key not in self.index.tensors:
            raise UserError(f"{self.engine}: does not hold {key}")
        entry = self.index.tensors[key]
        for rank, offset, size in entry.parts:
            self._span(rank, key, entry, offset, size)
        return entry

    def bytes(self, key: str) -> int:
        """Of a tensor's values, as `blocks` yields them."""
        entry = self.index.tensors[key]
        return prod(entry.shape) * max(np.dtype(TYPES[entry.dtype]).itemsize, 4 if entry.dtype == "BF16" else 1)

    def blocks(self, key: str) -> Iterator[tuple[int, Array]]:
        """A tensor's rows in their order: the number of the first of each block, and the block. BF16 comes as float32."""
        entry = self.entry(key)
        step = max(1, BLOCK // max(1, prod(entry.shape[1:])))
        for start in range(0, entry.shape[0] if entry.shape else 1, step):
            yield start, self._rows(key, entry, start, start + step)

    def rows(self, key: str, start: int, stop: int) -> Array:
        """The rows [start, stop) of a tensor; of one without dimensions all."""
        return self._rows(key, self.entry(key), start, stop)

    def _rows(self, key: str, entry: StoredTensor, start: int, stop: int) -> Array:
        shape = entry.shape
        stop = min(stop, shape[0]) if shape else 1
        found = np.empty((max(0, stop - start), *shape[1:]) if shape else (), TYPES[entry.dtype])
        for rank, offset, size in entry.parts:
            first, last = (max(start, offset[0]), min(stop, offset[0] + size[0])) if shape else (0, 1)
            if first < last:
                values = self._values(rank, key, entry, offset, size, first, last)
                others = (slice(o, o + n) for o, n in zip(offset[1:], size[1:], strict=True))
                found[(slice(first - start, last - start), *others) if shape else ()] = values
        return (found.astype("<u4") << 16).view("<f4") if entry.dtype == "BF16" else found

    def _values(self, rank: int, key: str, entry: StoredTensor, offset: Ints, size: Ints, first: int, last: int) -> Array:
        """The rows [first, last) of the tensor that a part has."""
        begin = self._span(rank, key, entry, offset, size).data_offsets[0] + self._headers[rank].start
        row = prod(size[1:]) * np.dtype(TYPES[entry.dtype]).itemsize
        start = begin + (first - offset[0] if offset else 0) * row
        content = read_range(self.engine / rank_file(rank), start, start + (last - first) * row)
        if len(content) != (last - first) * row:
            raise DamagedError(f"{self.engine / rank_file(rank)}: ends early")
        return np.frombuffer(content, TYPES[entry.dtype]).reshape((last - first, *size[1:]) if size else ())

    def _span(self, rank: int, key: str, entry: StoredTensor, offset: Ints, size: Ints) -> Span:
        if rank not in self._headers:
            self._headers[rank] = read_header(self.engine / rank_file(rank))
        span = self._headers[rank].spans.get(part_name(key, offset))
        if span is None or (span.dtype, span.shape) != (entry.dtype, size):
            there = "is missing" if span is None else f"is {span.dtype} {list(span.shape)}"
            wanted = f"{entry.dtype} {list(size)}"
            raise DamagedError(f"{self.engine / rank_file(rank)}: {part_name(key, offset)} {there}, the index says {wanted}")
        return span


@dataclass
class Figures:
    """Of the values of a tensor, block by block, in float64."""

    count: int = 0
    squares: float = 0.0
    total: float = 0.0
    least: float = np.inf
    greatest: float = -np.inf

    def add(self, block: Array) -> None:
        values = block.astype(np.float64).ravel()
        if values.size:
            self.count += values.size
            self.squares += float(values @ values)
            self.total += float(values.sum())
            self.least = float(np.minimum(self.least, values.min()))
            self.greatest = float(np.maximum(self.greatest, values.max()))

    @property
    def norm(self) -> float:
        return float(np.sqrt(self.squares))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


def figures(blocks: Sequence[Array] | Iterator[Array]) -> Figures:
    found = Figures()
    for block in blocks:
        found.add(block)
    return found
