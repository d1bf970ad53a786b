"""Which source each sample of a mixture comes from, computed from its number alone.

While the weights stay the same, source k, of weight w_k, has its samples at the places (1/2)/w_k, (3/2)/w_k, (5/2)/w_k, … of a
line, and the mixture takes the samples in the order of their places (the divisor method of Webster and Sainte-Laguë; on equal
places the source that is named first). So after any number of samples each source has its share of them, but for one or two.
Within a global batch the samples are shuffled, so that no rank gets one source more often than another; where all are of one
source, they keep its order.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil

import numpy as np


@dataclass(frozen=True)
class Phase:
    """The weights of all sources from a step on, in their order; those of weight 0 have no samples."""

    from_step: int
    weights: tuple[float, ...]


class Blend:
    """The order of the samples of several sources. It depends on weights, seed and batch size; not on ranks or restarts."""

    def __init__(self, phases: Sequence[Phase], global_batch_size: int, seed: int) -> None:
        """`phases` by ascending steps, the first of step 0."""
        assert phases[0].from_step == 0
        self._batch, self._seed = global_batch_size, seed
        self._weights = [phase.weights for phase in phases]
        self._firsts = [phase.from_step * global_batch_size for phase in phases]  # numbers of their first samples
        self._before = [(0,) * len(self._weights[0])]  # samples of each source in all earlier phases
        for weights, (first, following) in zip(self._weights, pairwise(self._firsts), strict=False):
            self._before.append(_sum(self._before[-1], apportioned(weights, following - first)))
        self._shuffled = lru_cache(maxsize=16)(self._shuffle)

    def counts_before(self, number: int) -> tuple[int, ...]:
        """How many samples of each source are in the batches before that of sample `number`."""
        number -= number % self._batch
        phase = bisect_right(self._firsts, number) - 1
        return _sum(self._before[phase], apportioned(self._weights[phase], number - self._firsts[phase]))

    def counts_after(self, number: int) -> tuple[int, ...]:
        """How many samples of each source are in the batches that have the first `number` samples."""
        return self.counts_before(number + self._batch - 1)

    def place(self, number: int) -> tuple[int, int]:
        """The source of sample `number`, and the sample's number in it."""
        phase = bisect_right(self._firsts, number) - 1
        weights, (batch, position) = self._weights[phase], divmod(number, self._batch)
        if sum(map(bool, weights)) > 1:
            position = int(self._shuffled(batch)[position])
        counts = apportioned(weights, batch * self._batch + position - self._firsts[phase])
        source = next_source(weights, counts)
        return source, self._before[phase][source] + counts[source]

    def _shuffle(self, batch: int) -> np.ndarray:
        digest = hashlib.sha256(f"order of batch {batch}, seed {self._seed}".encode()).digest()
        return np.random.RandomState(int.from_bytes(digest[:4])).permutation(self._batch)  # the same in all versions of NumPy


def apportioned(weights: Sequence[float], samples: int) -> tuple[int, ...]:
    """How many of the first `samples` samples each source has."""
    reach = samples / sum(weights)
    counts = [max(0, ceil(weight * reach - 0.5)) for weight in weights]
    # All places below `reach`, or nearly: rounding and the halves leave a few too many or too few.
    while sum(counts) > samples:
        counts[_last_source(weights, counts)] -= 1
    while sum(counts) < samples:
        counts[next_source(weights, counts)] += 1
    while samples and _key(weights, counts, last := _last_source(weights, counts), -1) > _key(
        weights, counts, following := next_source(weights, counts), 0
    ):
        counts[last] -= 1
        counts[following] += 1
    return tuple(counts)


def next_source(weights: Sequence[float], counts: Sequence[int]) -> int:
    """Whose sample comes next after so many of each source."""
    return min((source for source, weight in enumerate(weights) if weight), key=lambda source: _key(weights, counts, source, 0))


def _last_source(weights: Sequence[float], counts: Sequence[int]) -> int:
    """Whose sample was the last one."""
    return max((source for source, count in enumerate(counts) if count), key=lambda source: _key(weights, counts, source, -1))


def _key(weights: Sequence[float], counts: Sequence[int], source: int, later: int) -> tuple[float, int]:
    """What orders samples: the place of the one that is `later` than the next one of its source, and the source."""
    return (counts[source] + later + 0.5) / weights[source], source


def _sum(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(sum, zip(a, b, strict=True)))
