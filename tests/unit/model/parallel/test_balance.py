"""Stages of a pipeline: a block in each, the heaviest as light as undivided blocks allow."""

from __future__ import annotations

import itertools

import pytest

from model.parallel.balance import stage_bounds


def heaviest(weights: list[int], bounds: list[int]) -> int:
    return max(sum(weights[a:b]) for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    "weights",
    [
        [0, 0, 7, 7, 7, 7, 7, 7, 0, 0],
        [5000, 10, 7, 7, 7, 7, 7, 7, 1, 5000],  # a vocabulary that outweighs all blocks
        [3, 1, 9, 2, 8, 1, 7, 5, 1, 12],
    ],
)
def test_every_stage_has_a_block_and_no_split_is_better(weights: list[int], stages: int) -> None:
    blocks = range(2, len(weights) - 2)
    bounds = stage_bounds(weights, blocks[1:], stages)
    assert len(bounds) == stages + 1
    assert (bounds[0], bounds[-1]) == (0, len(weights))
    assert all(any(a <= block < b for block in blocks) for a, b in itertools.pairwise(bounds))
    every_split = ([0, *starts, len(weights)] for starts in itertools.combinations(range(3, len(weights) - 2), stages - 1))
    assert heaviest(weights, bounds) == min(heaviest(weights, split) for split in every_split)


def test_one_block_is_one_stage() -> None:
    assert stage_bounds([4, 1, 7, 1, 4], [], 1) == [0, 5]


def test_stages_begin_only_where_they_may() -> None:
    """For example in a row with layers between its blocks."""
    weights, starts = [1, 4, 4, 9, 1, 4, 4, 1], [2, 5, 6]
    edges = ([0, *cuts, 8] for cuts in itertools.combinations(starts, 2))
    assert stage_bounds(weights, starts, 3) in [bounds for bounds in edges if heaviest(weights, bounds) == 14]
