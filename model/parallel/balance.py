"""Which layers of a model's row each pipeline stage has. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def stage_bounds(weights: Sequence[int], starts: Sequence[int], stages: int) -> list[int]:
    """Stage s has layers [bounds[s], bounds[s + 1]) of a row; the heaviest stage is as light as possible.

    `weights`: of each layer. `starts`: the layers at which a stage other than the first may begin, in ascending order.
    """
    edges = [0, *starts, len(weights)]
    items = [sum(weights[edge:end]) for edge, end in pairwise(edges)]
    # (stages, items so far) → (the weight of the heaviest stage, the item at which the last stage begins)
    heaviest: dict[tuple[int, int], tuple[int, int]] = {(0, 0): (0, 0)}
    for stage in range(1, stages + 1):
        for end in range(stage, len(items) + 1):
            begins = [begin for begin in range(stage - 1, end) if (stage - 1, begin) in heaviest]
            heaviest[stage, end] = min((max(heaviest[stage - 1, begin][0], sum(items[begin:end])), begin) for begin in begins)
    bounds = [len(items)]
    for stage in range(stages, 0, -1):
        bounds.append(heaviest[stage, bounds[-1]][1])
    return [edges[bound] for bound in reversed(bounds)]
