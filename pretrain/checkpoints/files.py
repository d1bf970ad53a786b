"""The one form of a model's and its optimizer's state on disk, whatever layout wrote it and whatever layout reads it.

    engine/rank_00000.safetensors …   the parts that a rank wrote, each under KIND/NAME@OFFSET, and its random generators
           index.json                 every tensor's shape, type and parts

Each part of each tensor is there exactly once. docs/checkpoints.md describes the form byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError
from data_pipeline.read.manifest import FileRecord
from model.tensor_file import DTYPE_NAMES, DTYPES, Entry, write_tensors
from pretrain.checkpoints.boxes import Ints
from pretrain.checkpoints.index import INDEX, Index, StoredTensor, index_faults, part_name, rank_file, read_index
from pretrain.checkpoints.state import NotFiniteError, Part, State

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
    for fault in index_faults(index):
        raise UserError(f"the ranks' parts do not fit together: {fault}")
    return index


def write_parts(
    engine: Path, rank: int, parts: Sequence[Part], others: Mapping[str, Tensor], only_finite: bool = False
) -> tuple[Path, FileRecord]:
    """Write a rank's file, one tensor in CPU memory at a time; the file, its size and hash.

    `others` are tensors beside the parts, under names without `@`. Raises OSError, and NotFiniteError for a part with other
    values if it has to have `only_finite` ones.
    """
    path = engine / rank_file(rank)
    make = _finite if only_finite else _tensor
    entries = [
        Entry(part_name(part.key, part.offset), part.tensor.dtype, part.tensor.shape, partial(make, part)) for part in parts
    ]
    return path, FileRecord(*write_tensors(path, [*entries, *(Entry.of(name, tensor) for name, tensor in others.items())]))


def _tensor(part: Part) -> Tensor:
    return part.tensor


def _finite(part: Part) -> Tensor:
    values = part.tensor.detach().cpu()
    # By NumPy: torch would start threads of its own beside those of training.
    array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if array.size and not np.isfinite([array.min(), array.max()]).all():
        raise NotFiniteError(f"{part.key} is not finite")
    return values


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
            stored = self._opened[rank].get_slice(part_name(key, offset))
            if (stored.get_dtype(), stored.get_shape()) == (entry.dtype, list(size)):
                return stored[where] if where else self._opened[rank].get_tensor(part_name(key, offset))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        raise UserError(f"{path}: {key} is {stored.get_dtype()} {stored.get_shape()}, not as {INDEX} says")
