"""Stages of a pipeline: a block in each, the heaviest as light as whole blocks allow."""

from __future__ import annotations

import itertools

import pytest

from pretrain.backends.pipeline import stage_bounds


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
def test_every_stage_has_a_block_and_no_cut_is_better(weights: list[int], stages: int) -> None:
    blocks = range(2, len(weights) - 2)
    bounds = stage_bounds(weights, stages)
    assert len(bounds) == stages + 1
    assert (bounds[0], bounds[-1]) == (0, len(weights))
    assert all(any(a <= block < b for block in blocks) for a, b in itertools.pairwise(bounds))
    every_cut = ([0, *cuts, len(weights)] for cuts in itertools.combinations(range(3, len(weights) - 2), stages - 1))
    assert heaviest(weights, bounds) == min(heaviest(weights, cut) for cut in every_cut)


def test_one_block_is_one_stage() -> None:
    assert stage_bounds([4, 1, 7, 1, 4], 1) == [0, 5]
