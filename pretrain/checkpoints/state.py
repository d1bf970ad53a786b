"""What a checkpoint keeps, as any layout says it: rectangles of the unsharded model's tensors, and the memory they lie in.

A `Part` is written from its tensor and read into it. A tensor-parallel block or an FSDP shard is one part. A contiguous
fragment of a flattened block, as ZeRO shards it, is a few: at most 2d - 1 in d dimensions, each a view of the fragment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from math import prod

from pydantic import JsonValue
from torch import Tensor

from configs.errors import UserError
from pretrain.checkpoints.boxes import Ints, flat_boxes

WEIGHTS = "model"  # the kind of the fp32 weights; kinds without a name here are the optimizer's
AVERAGE = "average"  # of their exponential average, which has followed AVERAGED_STEPS steps
AVERAGED_STEPS = "average_steps"


def saved_kind(number: int) -> str:
    """The kind of the weights of an earlier save, counted back from 1, the last one."""
    return f"saved_{number}"


def saved_kinds(kinds: Container[str]) -> list[str]:
    """Those of earlier saves among the kinds of a checkpoint, the last save first."""
    return list(takewhile(kinds.__contains__, map(saved_kind, count(1))))


class NotFiniteError(UserError):
    """Weights or optimizer state that no run can use."""


@dataclass(frozen=True)
class Part:
    """A rectangle of one tensor of the model or the optimizer."""

    name: str  # the parameter's in the unsharded model
    kind: str
    shape: Ints  # of the unsharded tensor
    offset: Ints  # the rectangle's origin
    tensor: Tensor  # the rectangle
    owned: bool = True  # of several ranks with the same part one writes it
    fixed: bool = False  # nothing writes into the tensor any more

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class State:
    """What one rank holds of a model and its optimizer, as views: to write into them is to change the engine."""

    parts: list[Part]
    scalars: Mapping[str, Sequence[Tensor]]  # values such as the number of steps; all tensors of a name have the same one
    notes: Mapping[str, JsonValue] = field(default_factory=dict)  # what the engine wants to know when it is built again

    @classmethod
    def unsharded(cls, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Tensor]) -> State:
        """Of a process that holds everything: tensors by kind and name."""
        parts = [
            Part(name, kind, tuple(tensor.shape), (0,) * tensor.dim(), tensor)
            for kind, of_kind in tensors.items()
            for name, tensor in of_kind.items()
        ]
        return cls(parts, {name: [scalar] for name, scalar in scalars.items()})

    @classmethod
    def joined(cls, states: Iterable[State]) -> State:
        """All that several of one rank hold; no two have a kind, a scalar or a note in common."""
        parts, scalars, notes = list[Part](), dict[str, Sequence[Tensor]](), dict[str, JsonValue]()
        for state in states:
            parts += state.parts
            scalars |= state.scalars
            notes |= state.notes
        return cls(parts, scalars, notes)

    def set_scalars(self, values: Mapping[str, float]) -> None:
        """Fill the scalars. UserError if one of them is not among `values`."""
        for name, scalars in self.scalars.items():
            if name not in values:
                raise UserError(f"the checkpoint does not hold the optimizer's {name}")
            for scalar in scalars:
                scalar.fill_(values[name])

    def scalar_values(self) -> dict[str, float]:
        """Each scalar's value. UserError if the tensors of a name differ."""
        values = {}
        for name, scalars in self.scalars.items():
            found = {float(scalar) for scalar in scalars}
            if len(found) > 1:
                raise UserError(f"{name} is {sorted(found)}: it must be one value")
            values[name] = found.pop()
        return values

    def by_kind(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of an unsharded state by kind and name."""
        tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for part in self.parts:
            tensors[part.kind][part.name] = part.tensor
        return dict(tensors)


@dataclass(frozen=True)
class Block:
    """The block of a parameter that a tensor-parallel rank holds: where it lies, and whether this rank writes it."""

    name: str
    unsharded: Ints  # shape of the parameter
    origin: Ints
    shape: Ints  # of the block, with rows that only fill up a vocabulary
    owned: bool = True

    def part(self, kind: str, tensor: Tensor, offset: Ints | None = None) -> Iterator[Part]:
        """The rectangle at `offset` of the block, by default all of it; nothing if it is empty or all padding."""
        start = tuple(a + b for a, b in zip(self.origin, offset or (0,) * len(self.origin), strict=True))
        inside = tensor[tuple(slice(0, max(0, end - at)) for end, at in zip(self.unsharded, start, strict=True))]
        if inside.numel():
            yield Part(self.name, kind, self.unsharded, start, inside, self.owned)

    def fragment(self, kind: str, flat: Tensor, start: int) -> Iterator[Part]:
        """The rectangles of `flat`, which holds the values from number `start` on of the flattened block."""
        position = 0
        for offset, size in flat_boxes(self.shape, start, start + flat.numel()):
            end = position + prod(size)
            yield from self.part(kind, flat[position:end].view(size), offset)
            position = end


def takes_turn(number: int, *replicas: tuple[int, int]) -> bool:
    """Whether, of equal copies of parameter `number`, this one is written: copies take turns, so that all ranks write.

    `replicas` are this copy's coordinate and the number of copies along each axis of ranks that hold the parameter alike.
    """
    copy, copies = 0, 1
    for coordinate, size in replicas:
        copy, copies = copy * size + coordinate, copies * size
    return number % copies == copy
