"""Rectangles of tensors, against NumPy's slicing of the tensors themselves."""

from __future__ import annotations

import random
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from pretrain.checkpoints.boxes import Box, Ints, fills, flat_boxes
from pretrain.checkpoints.state import Block, Part, State, takes_turn


def counted(shape: Ints) -> Tensor:
    """Every value another."""
    return torch.arange(prod(shape), dtype=torch.float32).view(shape)


def random_shape(draw: random.Random) -> Ints:
    return tuple(draw.randrange(1, 6) for _ in range(draw.randrange(0, 5)))


def test_scalars_of_one_name_are_one_value() -> None:
    steps = [torch.tensor(2.0), torch.tensor(2.0)]
    state = State([], {"step": steps})
    assert state.scalar_values() == {"step": 2.0}
    state.set_scalars({"step": 7.0, "other": 1.0})
    assert steps == [torch.tensor(7.0)] * 2
    with pytest.raises(UserError, match="does not hold the optimizer's step"):
        state.set_scalars({"other": 1.0})
    steps[1].fill_(8.0)
    with pytest.raises(UserError, match=r"^step is \[7.0, 8.0\]: it must be one value"):
        state.scalar_values()


@pytest.mark.parametrize("seed", range(200))
def test_a_flat_fragment_is_a_few_rectangles_in_order(seed: int) -> None:
    draw = random.Random(seed)
    shape = random_shape(draw)
    start, stop = sorted(draw.randrange(prod(shape) + 1) for _ in range(2))
    values = np.arange(prod(shape)).reshape(shape)
    boxes = list(flat_boxes(shape, start, stop))
    found = [values[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].ravel() for box in boxes]
    assert np.array_equal(np.concatenate([*found, np.arange(0)]), np.arange(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(min(size, default=1) > 0 for _, size in boxes)


def filled_from(parts: list[Part], shape: Ints) -> Tensor:
    tensor = torch.full(shape, torch.nan)
    for part in parts:
        assert part.shape == shape
        here = tensor[tuple(slice(o, o + n) for o, n in zip(part.offset, part.tensor.shape, strict=True))]
        assert bool(here.isnan().all()), "two parts overlap"
        here.copy_(part.tensor)
    return tensor


@pytest.mark.parametrize("seed", range(50))
def test_parts_of_all_ranks_make_up_the_tensor(seed: int) -> None:
    """Shards of tensor-parallel ranks, the last ones padded, each in equal flat fragments with more padding at the end."""
    draw = random.Random(seed)
    shape = tuple(draw.randrange(1, 8) for _ in range(draw.randrange(1, 4)))
    dim, ranks, shares = draw.randrange(len(shape)), draw.randrange(1, 5), draw.randrange(1, 6)
    unsharded, length = counted(shape), -(-shape[dim] // ranks)
    padded = torch.full([ranks * length if d == dim else n for d, n in enumerate(shape)], -1.0)
    padded[tuple(slice(n) for n in shape)] = unsharded
    parts: list[Part] = []
    for rank in range(ranks):
        shard = padded.narrow(dim, rank * length, length)
        origin = tuple(rank * length if d == dim else 0 for d in range(len(shape)))
        block = Block("w", shape, origin, tuple(shard.shape))
        flat = shard.flatten()
        share = -(-flat.numel() // shares)
        for number in range(shares):
            parts += block.fragment("model", flat[number * share : (number + 1) * share], number * share)
    assert torch.equal(filled_from(parts, shape), unsharded)
    assert fills(shape, [(part.offset, tuple(part.tensor.shape)) for part in parts])


def test_a_part_is_a_view() -> None:
    flat = torch.zeros(10)
    for part in Block("w", (4, 5), (0, 0), (4, 5)).fragment("model", flat, start=7):
        part.tensor.fill_(1.0)
    assert torch.equal(flat, torch.ones(10))


def test_what_is_empty_or_padding_is_no_part() -> None:
    assert not list(Block("w", (5, 2), (6, 0), (2, 2)).part("model", torch.ones(2, 2)))
    assert not list(Block("w", (5, 2), (0, 0), (5, 2)).part("model", torch.ones(0, 2), (5, 0)))
    (scalar,) = Block("w", (), (), ()).part("model", torch.tensor(3.0))
    assert (scalar.key, scalar.shape, scalar.offset, float(scalar.tensor)) == ("model/w", (), (), 3.0)


def random_boxes(draw: random.Random, offset: Ints, size: Ints) -> list[Box]:
    """A random dissection by straight cuts."""
    able = [dim for dim, length in enumerate(size) if length > 1]
    if not able or draw.random() < 0.2:
        return [(offset, size)]
    dim = draw.choice(able)
    at = draw.randrange(1, size[dim])
    near, far, origin = [*size], [*size], [*offset]
    near[dim], far[dim], origin[dim] = at, size[dim] - at, offset[dim] + at
    return [*random_boxes(draw, offset, tuple(near)), *random_boxes(draw, tuple(origin), tuple(far))]


@pytest.mark.parametrize("seed", range(100))
def test_dissections_fill_and_nothing_else_does(seed: int) -> None:
    """What is wrong by one box is found, as counting every value finds it."""
    draw = random.Random(seed)
    shape = tuple(draw.randrange(1, 7) for _ in range(draw.randrange(1, 4)))
    boxes = random_boxes(draw, (0,) * len(shape), shape)
    draw.shuffle(boxes)
    assert fills(shape, boxes)
    for _ in range(10):
        changed = list(boxes)
        offset, size = changed.pop(draw.randrange(len(changed)))
        if draw.random() < 0.7:
            moved = tuple(max(0, o + draw.choice((-1, 0, 1))) for o in offset)
            changed.append((moved, tuple(max(1, n + draw.choice((-1, 0, 1))) for n in size)))
        assert fills(shape, changed) == by_counting(shape, changed)


def by_counting(shape: Ints, boxes: list[Box]) -> bool:
    counts = np.zeros([n + 8 for n in shape], dtype=int)
    for offset, size in boxes:
        counts[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))] += 1
    inside = tuple(slice(0, n) for n in shape)
    return bool((counts[inside] == 1).all()) and counts.sum() == prod(shape)


def test_scalars_and_empty_tensors() -> None:
    assert fills((), [((), ())])
    assert not fills((), [])
    assert not fills((), [((), ())] * 2)
    assert fills((0, 3), [])
    assert not fills((2, 3), [])


def test_copies_take_turns() -> None:
    """Over 2 × 3 copies each parameter is written once, and every copy writes as many."""
    for number in range(12):
        written = [(a, b) for a in range(2) for b in range(3) if takes_turn(number, (a, 2), (b, 3))]
        assert written == [divmod(number % 6, 3)]
    assert takes_turn(5)
