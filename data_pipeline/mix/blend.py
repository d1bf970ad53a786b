"""Which source each sample of a mixture comes from, computed from its number alone.

While the shares stay the same, source k, of share w, has its samples at the places u/w, (1 + u)/w, (2 + u)/w, … of a line, and
the mixture takes the samples in the order of their places. u, between 0 and 1, is another one for each source, so that small
sources do not all come at once. So after any number of samples each source has its share of them, but for one or two. Blocks of
a global batch's size are shuffled, so that no rank gets one source more often than another; where all samples are of one
source, they keep its order.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

GOLDEN = (5**0.5 - 1) / 2  # its multiples, without their whole parts, are spread evenly, however many there are


@dataclass(frozen=True)
class Phase:
    """The shares of all sources from the sample with number `first` on, in their order; 0 for those without samples."""

    first: int
    shares: tuple[float, ...]


class Blend:
    """The order of the samples of several sources. It depends on shares, seed and batch size; not on ranks or restarts."""

    def __init__(self, phases: Sequence[Phase], global_batch_size: int, seed: int) -> None:
        """`phases` by ascending numbers, the first of sample 0."""
        assert phases[0].first == 0
        self._size, self._seed = global_batch_size, seed
        self._firsts = [phase.first for phase in phases]
        self._lines = [Line(phase.shares) for phase in phases]
        self._before = [np.zeros(len(phases[0].shares), np.int64)]  # samples of each source in all earlier phases
        for place, following in enumerate(self._firsts[1:]):
            self._before.append(self._before[-1] + self._lines[place].counts(following - self._firsts[place]))
        self._block = lru_cache(maxsize=16)(self._make_block)

    def place(self, number: int) -> tuple[int, int]:
        """The source of sample `number`, and the sample's number in it."""
        start, _, _ = self._bounds(number)
        return self._block(start)[number - start]

    def counts(self, number: int) -> list[int]:
        """How many samples each source has among the first `number`."""
        start, _, phase = self._bounds(number)
        taken = Counter(source for source, _ in self._block(start)[: number - start])
        return [count + taken[source] for source, count in enumerate(self._counts_at(start, phase))]

    def counts_before(self, number: int) -> list[int]:
        """Those before the block of sample `number`."""
        start, _, phase = self._bounds(number)
        return self._counts_at(start, phase)

    def counts_after(self, number: int) -> list[int]:
        """Those up to the end of the block that has sample `number` - 1."""
        if number == 0:
            return self.counts_before(0)
        _, stop, phase = self._bounds(number - 1)
        return self._counts_at(stop, phase)

    def _bounds(self, number: int) -> tuple[int, int, int]:
        """First and last + 1 of the samples of a number's block, and its phase."""
        phase = bisect_right(self._firsts, number) - 1
        start = number - (number - self._firsts[phase]) % self._size
        return start, min([start + self._size, *self._firsts[phase + 1 : phase + 2]]), phase

    def _counts_at(self, number: int, phase: int) -> list[int]:
        counts: list[int] = (self._before[phase] + self._lines[phase].counts(number - self._firsts[phase])).tolist()
        return counts

    def _make_block(self, start: int) -> list[tuple[int, int]]:
        """Source and own number of each sample of a block."""
        _, stop, phase = self._bounds(start)
        counts, block = self._counts_at(start, phase), list[tuple[int, int]]()
        for source in self._lines[phase].following(start - self._firsts[phase], stop - start):
            block.append((source, counts[source]))
            counts[source] += 1
        if len(self._lines[phase].sources) == 1:
            return block
        digest = hashlib.sha256(f"order from sample {start}, seed {self._seed}".encode()).digest()
        order = np.random.RandomState(int.from_bytes(digest[:4])).permutation(len(block))  # the same in all versions of NumPy
        return [block[place] for place in order]


class Line:
    """The places of the samples of all sources, while their shares stay the same."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.number = len(shares)
        self.sources = np.flatnonzero(shares)  # those that have samples
        self._shares = np.array(shares, np.float64)[self.sources]
        self._offsets = (np.arange(1, len(self.sources) + 1) * GOLDEN) % 1.0

    def counts(self, samples: int) -> np.ndarray:
        """How many of the first `samples` samples each source has, int64."""
        counts = np.zeros(self.number, np.int64)
        counts[self.sources] = self._counts(samples)
        return counts

    def following(self, samples: int, number: int) -> list[int]:
        """The sources of the next `number` samples after the first `samples`."""
        counts, found = self._counts(samples), []
        for _ in range(number):
            source, _ = self._next(counts)
            found.append(int(self.sources[source]))
            counts[source] += 1
        return found

    def _counts(self, samples: int) -> np.ndarray:
        reach = samples / self._shares.sum()
        counts = np.maximum(0, np.ceil(reach * self._shares - self._offsets)).astype(np.int64)
        # All places below `reach`, or nearly: a few samples are too many or too few.
        while (left := samples - int(counts.sum())) != 0:
            source = self._next(counts)[0] if left > 0 else self._last(counts)[0]
            counts[source] += 1 if left > 0 else -1
        # Rounding may have taken a sample that lies behind one that is left out.
        while samples and self._next(counts)[::-1] < (last := self._last(counts))[::-1]:
            following = self._next(counts)[0]
            counts[last[0]] -= 1
            counts[following] += 1
        return counts

    def _next(self, counts: np.ndarray) -> tuple[int, float]:
        """Whose sample comes next, and its place; of equal places that of the source named first."""
        places = (counts + self._offsets) / self._shares
        source = int(places.argmin())
        return source, float(places[source])

    def _last(self, counts: np.ndarray) -> tuple[int, float]:
        """Whose sample was the last one, and its place."""
        places = np.where(counts > 0, (counts - 1 + self._offsets) / self._shares, -np.inf)
        source = len(places) - 1 - int(places[::-1].argmax())
        return source, float(places[source])
