"""Left-out samples against a list that is written out number by number."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from data_pipeline.mix.order import OrderedSamples, SampleOrder
from data_pipeline.read.loader import TrainLoader

CASES: list[list[list[int]]] = [
    [],
    [[0, 5]],
    [[3, 4], [7, 9]],
    [[7, 9], [3, 4]],
    [[3, 5], [5, 8]],  # without a gap
    [[2, 9], [4, 6], [8, 12]],  # overlapping
    [[0, 3], [6, 20]],
]


def written_out(left_out: list[list[int]], count: int = 60) -> list[int]:
    return [number for number in range(count) if not any(first <= number < last for first, last in left_out)]


def drawn(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [sorted(draw.sample(range(40), 2)) for _ in range(draw.randrange(1, 6))]


@pytest.mark.parametrize("left_out", [*CASES, *map(drawn, range(20))])
def test_numbers_are_those_that_are_left(left_out: list[list[int]]) -> None:
    order, expected = SampleOrder(left_out), written_out(left_out)
    assert [order.number(turn) for turn in range(len(expected))] == expected
    turns = {number: turn for turn, number in enumerate(expected)}
    assert [order.turn(number) for number in range(60)] == [turns.get(number) for number in range(60)]
    for first, last in ((0, len(expected)), (1, 9), (4, 5), (8, 15), (3, 3)):
        ranges = order.numbers(first, last)
        assert [number for begin, end in ranges for number in range(begin, end)] == expected[first:last]
        assert all(end < begin for (_, end), (begin, _) in itertools.pairwise(ranges))  # as few as possible


class Numbers:
    """Samples whose tokens are their number; only those that were asked for can be read."""

    samples_per_epoch = 7

    def __init__(self) -> None:
        self.readable = range(0)

    def prepare_range(self, first: int, last: int) -> None:
        self.readable = range(first, last)

    def sample(self, number: int) -> np.ndarray:
        assert number in self.readable
        return np.full(3, number)


@pytest.mark.parametrize("left_out", [[], [[3, 5], [9, 26]]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loader_deals_out_what_is_left(left_out: list[list[int]], ranks: int) -> None:
    expected = written_out(left_out)
    loaders = [
        TrainLoader(OrderedSamples(Numbers(), SampleOrder(left_out)), 4, 1, rank, ranks, steps=5) for rank in range(ranks)
    ]
    for step in range(5):
        passes = zip(*(loader.step(step) for loader in loaders), strict=True)  # micro-batches of all ranks, one after the other
        dealt = torch.stack([batch.tokens for of_ranks in passes for batch in of_ranks])
        assert dealt[:, 0, 0].tolist() == expected[4 * step : 4 * step + 4]
    for loader in loaders:
        loader.close()
