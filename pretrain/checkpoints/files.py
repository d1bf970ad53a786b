"""The one form of a model's and its optimizer's state on disk, whatever layout wrote it and whatever layout reads it.

    engine/rank_00000.safetensors …   the parts that a rank wrote, each under KIND/NAME@OFFSET, and its random generators
           index.json                 every tensor's shape, type and parts

Each part of each tensor is there exactly once. docs/checkpoints.md describes the form byte by byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError
from data_pipeline.read.manifest import FileRecord
from model.tensor_file import DTYPE_NAMES, DTYPES, Entry, write_tensors
from pretrain.checkpoints.folder import DamagedError, read_json
from pretrain.checkpoints.state import Ints, NotFiniteError, Part, State, fills

INDEX = "index.json"
_KEY = re.compile(r"\w+/[\w.]+")
_Indices = tuple[NonNegativeInt, ...]
StoredPart = tuple[Annotated[int, Field(ge=0, lt=10**7)], _Indices, tuple[PositiveInt, ...]]  # rank, origin, size


@dataclass(frozen=True)
class StoredTensor:
    """An entry of index.json."""

    shape: _Indices
    dtype: Literal["F64", "F32", "BF16", "I64", "U8"]
    parts: list[StoredPart]


@dataclass(frozen=True)
class Index:
    """Content of index.json."""

    format: Literal["manyheads-state-1"]
    tensors: dict[str, StoredTensor]

    @property
    def kinds(self) -> set[str]:
        """The kinds of its tensors."""
        return {key.partition("/")[0] for key in self.tensors}


# What a rank is about to write, without the values: key, type, shape, origin and size of each part.
Holding = list[tuple[str, str, Ints, Ints, Ints]]


def holding(state: State) -> Holding:
    """What a rank with this state writes."""
    return [
        (part.key, DTYPE_NAMES[part.tensor.dtype], part.shape, part.offset, tuple(part.tensor.shape))
        for part in state.parts
        if part.owned
    ]


def make_index(holdings: Sequence[Holding]) -> Index:
    """The index of what all ranks, in their order, are about to write.

    UserError unless their parts fill every tensor exactly once.
    """
    tensors: dict[str, StoredTensor] = {}
    for rank, parts in enumerate(holdings):
        for key, dtype, shape, offset, size in parts:
            entry = tensors.setdefault(key, StoredTensor(shape, dtype, []))  # type: ignore[arg-type]
            if (entry.shape, entry.dtype) != (shape, dtype):
                raise UserError(f"{key}: {entry.dtype} {list(entry.shape)} on one rank, {dtype} {list(shape)} on rank {rank}")
            entry.parts.append((rank, offset, size))
    index = Index("manyheads-state-1", tensors)
    for fault in _faults(index):
        raise UserError(f"the ranks' parts do not fit together: {fault}")
    return index


def write_parts(engine: Path, rank: int, parts: Sequence[Part], others: Mapping[str, Tensor]) -> tuple[Path, FileRecord]:
    """Write a rank's file, one tensor in CPU memory at a time; the file, its size and hash.

    Raises OSError, and NotFiniteError: what no run can use is not worth a checkpoint. `others` are
    tensors beside the parts, under names without `@`.
    """
    path = engine / rank_file(rank)
    entries = [
        Entry(_part_name(part.key, part.offset), part.tensor.dtype, part.tensor.shape, partial(_finite, part)) for part in parts
    ]
    return path, FileRecord(*write_tensors(path, [*entries, *(Entry.of(name, tensor) for name, tensor in others.items())]))


def _finite(part: Part) -> Tensor:
    values = part.tensor.detach().cpu()
    if not all(bool(torch.isfinite(end)) for end in torch.aminmax(values)):
        raise NotFiniteError(f"{part.key} is not finite")
    return values


def index_text(index: Index) -> str:
    """The content of index.json."""
    return json.dumps(asdict(index), separators=(",", ":"))


def read_index(engine: Path) -> Index:
    """index.json, complete and consistent in itself. UserError for anything that `make_index` does not make."""
    index = read_json(engine / INDEX, Index)
    for fault in _faults(index):
        raise DamagedError(f"{engine / INDEX}: is damaged ({fault})")
    return index


def _faults(index: Index) -> Iterator[str]:
    checked = set()  # an optimizer's tensors are sharded like the weights
    for key, entry in index.tensors.items():
        if not _KEY.fullmatch(key):
            yield f"{key!r} is no KIND/NAME"
        boxes = tuple((offset, size) for _, offset, size in entry.parts)
        if (entry.shape, boxes) in checked:
            continue
        if any(len(offset) != len(entry.shape) or len(size) != len(entry.shape) for offset, size in boxes):
            yield f"a part of {key} has another number of dimensions"
        elif not fills(entry.shape, boxes):
            yield f"the parts of {key} do not fill it exactly once"
        checked.add((entry.shape, boxes))


class Reader:
    """Reads any rectangle of any tensor of a stored state; files are mapped, so that only what is copied is read."""

    def __init__(self, engine: Path, index: Index | None = None) -> None:
        """`index` if it has been read already. UserError for a damaged one."""
        self.engine, self.index = engine, index or read_index(engine)
        self._opened: dict[int, Any] = {}

    def check(self, kinds: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """That each kind has tensors of just these names and shapes, in float32. UserError names the first difference."""
        expected = {f"{kind}/{name}": tuple(shape) for kind, shapes in kinds.items() for name, shape in shapes.items()}
        found = {key: entry for key, entry in self.index.tensors.items() if key.partition("/")[0] in kinds}
        for key in sorted(expected.keys() | found.keys()):
            entry, shape = found.get(key), expected.get(key)
            if entry is None or shape is None:
                missing = "misses" if entry is None else "has besides"
                raise UserError(f"{self.engine / INDEX}: does not hold this model and its optimizer: it {missing} {key}")
            if entry.shape != shape or entry.dtype != "F32":
                raise UserError(
                    f"{self.engine / INDEX}: {key} is {entry.dtype} {list(entry.shape)}, in this model F32 {list(shape)}"
                )

    def load(self, state: State) -> None:
        """Fill all tensors of `state`. UserError where the files do not hold them."""
        for part in state.parts:
            self.fill(part)

    def read(self, kind: str, name: str) -> Tensor:
        """A tensor, unsharded, on the CPU."""
        entry = self._entry(f"{kind}/{name}")
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self.fill(Part(name, kind, entry.shape, (0,) * len(entry.shape), tensor))
        return tensor

    def files(self, kind: str) -> list[Path]:
        """The files that `read` of a kind opens, the index among them."""
        of_kind = [entry for key, entry in self.index.tensors.items() if key.startswith(f"{kind}/")]
        ranks = sorted({rank for entry in of_kind for rank, _, _ in entry.parts})
        return [self.engine / INDEX, *(self.engine / rank_file(rank) for rank in ranks)]

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """Copy into the part's tensor what the checkpoint has there, however it was sharded."""
        entry = self._entry(part.key)
        dtype = DTYPE_NAMES.get(part.tensor.dtype)
        if (entry.shape, entry.dtype) != (part.shape, dtype):
            raise UserError(
                f"{self.engine / INDEX}: {part.key} is {entry.dtype} {list(entry.shape)}, not {dtype} {list(part.shape)}"
            )
        for rank, offset, size in entry.parts:
            spans = [
                (max(mine, stored), min(mine + length, stored + stored_length))
                for mine, length, stored, stored_length in zip(part.offset, part.tensor.shape, offset, size, strict=True)
            ]
            if all(start < end for start, end in spans):
                here = tuple(slice(start - o, end - o) for (start, end), o in zip(spans, part.offset, strict=True))
                there = tuple(slice(start - o, end - o) for (start, end), o in zip(spans, offset, strict=True))
                part.tensor[here].copy_(self._stored(rank, part.key, entry, offset, size, there))

    def _entry(self, key: str) -> StoredTensor:
        if key not in self.index.tensors:
            raise UserError(f"{self.engine / INDEX}: does not hold {key}")
        return self.index.tensors[key]

    def _stored(self, rank: int, key: str, entry: StoredTensor, offset: Ints, size: Ints, where: tuple[slice, ...]) -> Tensor:
        """What a rank's file has of a part."""
        path = self.engine / rank_file(rank)
        try:
            if rank not in self._opened:
                self._opened[rank] = safe_open(path, framework="pt", device="cpu")
            stored = self._opened[rank].get_slice(_part_name(key, offset))
            if (stored.get_dtype(), stored.get_shape()) == (entry.dtype, list(size)):
                return stored[where] if where else self._opened[rank].get_tensor(_part_name(key, offset))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        raise UserError(f"{path}: {key} is {stored.get_dtype()} {stored.get_shape()}, not as {INDEX} says")


def _part_name(key: str, offset: Ints) -> str:
    return f"{key}@{','.join(map(str, offset))}"


def rank_file(rank: int) -> str:
    """The name of a rank's file in the folder `engine`."""
    return f"rank_{rank:05d}.safetensors"
