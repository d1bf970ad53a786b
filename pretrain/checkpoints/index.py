"""index.json, which says of every tensor of a checkpoint where its parts are. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pretrain.checkpoints.boxes import Ints, fills
from pretrain.checkpoints.folder import DamagedError, read_json
from pretrain.checkpoints.storage import Place

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


def index_text(index: Index) -> str:
    """The content of index.json."""
    return json.dumps(asdict(index), separators=(",", ":"))


def read_index(engine: Place) -> Index:
    """index.json, complete and consistent in itself. UserError for anything that `make_index` does not make."""
    index = read_json(engine / INDEX, Index)
    for fault in index_faults(index):
        raise DamagedError(f"{engine / INDEX}: is damaged ({fault})")
    return index


def index_faults(index: Index) -> Iterator[str]:
    """What contradicts itself."""
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


def part_name(key: str, offset: Ints) -> str:
    """The name of a part in the file of its rank."""
    return f"{key}@{','.join(map(str, offset))}"


def rank_file(rank: int) -> str:
    """The name of a rank's file in the folder `engine`."""
    return f"rank_{rank:05d}.safetensors"
