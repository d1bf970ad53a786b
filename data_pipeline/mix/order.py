"""Training data without the samples that `training.skip_samples` leaves out.

Samples keep their numbers. What counts how far training has come is their *turn*: 0 for the first sample that is taken, 1 for
the second. Without left-out samples the turn is the number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_pipeline.read.loader import Samples


class SampleOrder:
    """Sample numbers in the order in which training takes them."""

    def __init__(self, left_out: Sequence[list[int]]) -> None:
        """`left_out` are ranges [from, to] of numbers with from ≤ number < to, in any order; they may overlap."""
        self._turns: list[int] = []  # of the first sample after each range
        self._left_out: list[int] = []  # samples in all ranges up to that one
        end = count = 0
        for first, last in sorted(left_out):
            first = max(first, end)
            if first < last:
                self._turns.append(first - count)
                count += last - first
                self._left_out.append(count)
                end = last

    @property
    def left_out(self) -> int:
        """The number of samples that are left out."""
        return self._left_out[-1] if self._left_out else 0

    def number(self, turn: int) -> int:
        """The number of the sample whose turn it is."""
        ranges = bisect_right(self._turns, turn)
        return turn + (self._left_out[ranges - 1] if ranges else 0)

    def turn(self, number: int) -> int | None:
        """When the sample has its turn; None if it is left out."""
        ranges = bisect_right([first + count for first, count in zip(self._turns, self._left_out, strict=True)], number)
        turn = number - (self._left_out[ranges - 1] if ranges else 0)
        return turn if self.number(turn) == number else None

    def spans(self, turns: int, step: int) -> Iterator[tuple[int, int]]:
        """The numbers from ≤ n < to of all `turns` turns after a multiple of `step` that leave samples out between them."""
        starts = {
            max(0, start) for turn in self._turns for start in range((turn - 1) // step * step - turns + step, turn, step)
        }
        for start in sorted(starts):
            yield self.number(start), self.number(start + turns - 1) + 1

    def numbers(self, first: int, last: int) -> list[list[int]]:
        """Those of the turns first ≤ turn < last as ranges [from, to], from ≤ number < to, as few as possible."""
        cuts = sorted({first, last, *(turn for turn in self._turns if first < turn < last)})
        return [[self.number(begin), self.number(end - 1) + 1] for begin, end in pairwise(cuts)]


class OrderedSamples:
    """A data set in that order: its samples by their turns."""

    def __init__(self, dataset: Samples, order: SampleOrder) -> None:
        self._dataset, self._order = dataset, order
        self.samples_per_epoch = dataset.samples_per_epoch

    def prepare_range(self, first: int, last: int) -> None:
        """Make the samples of the turns first ≤ turn < last readable; as `TokenDataset.prepare_range`."""
        self._dataset.prepare_range(self._order.number(first), self._order.number(last - 1) + 1)

    def sample(self, turn: int) -> np.ndarray:
        return self._dataset.sample(self._order.number(turn))
