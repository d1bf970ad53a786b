"""The order of a mixture against one that is drawn up sample by sample."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from data_pipeline.mix.blend import Blend, Line, Phase

BATCH = 8


def drawn_up(weights: Sequence[float], samples: int) -> list[int]:
    """The sources of the first samples: a queue of each source's next place."""
    sources = [source for source, weight in enumerate(weights) if weight]
    offsets = {source: (5**0.5 - 1) / 2 * (place + 1) % 1 for place, source in enumerate(sources)}
    queue = [(offsets[source] / weights[source], source, 0) for source in sources]
    heapq.heapify(queue)
    found = []
    for _ in range(samples):
        _, source, number = heapq.heappop(queue)
        found.append(source)
        heapq.heappush(queue, ((number + 1 + offsets[source]) / weights[source], source, number + 1))
    return found


def drawn_weights(seed: int) -> list[float]:
    draw = random.Random(seed)
    return [1.0, *(draw.choice([1, 1, 2, 0.1, 0.3, 1e-3, 0, draw.random()]) for _ in range(draw.randrange(6)))]


@pytest.mark.parametrize("seed", range(40))
def test_shares_of_any_number_of_samples(seed: int) -> None:
    weights, counts = drawn_weights(seed), Counter[int]()
    line, order = Line(weights), drawn_up(weights, 300)
    for number, source in enumerate(order):
        assert line.counts(number).tolist() == [counts[other] for other in range(len(weights))]
        counts[source] += 1
    assert line.following(117, 60) == order[117:177]


@pytest.mark.parametrize("weights", [[0.5, *[0.005] * 100], [1.0] * 30, [0.9, 0.09, 0.009, 0.001], [0.7, 0.3]], ids=len)
def test_no_source_is_ever_far_from_its_share(weights: list[float]) -> None:
    """Many small ones do not come all at once, either."""
    shares, counts = np.array(weights) / sum(weights), np.zeros(len(weights))
    for number, source in enumerate(drawn_up(weights, 2000), start=1):
        counts[source] += 1
        assert abs(counts - number * shares).max() < 1.5
    assert Line(weights).counts(2000).tolist() == counts.tolist()


def test_far_away_shares_are_exact() -> None:
    assert Line((0.7, 0.2, 0.1)).counts(10**12).tolist() == [7 * 10**11, 2 * 10**11, 10**11]


# Samples to the beginning of each phase: the third begins in the middle of a batch, as after samples that are left out.
PHASES = [Phase(0, (0.7, 0.3, 0.0)), Phase(24, (0.0, 1.0, 0.0)), Phase(43, (0.2, 0.2, 0.6)), Phase(80, (0.5, 0.5, 0.0))]


def test_each_sample_of_a_source_comes_once_and_in_its_turn() -> None:
    """Over changes of the shares: blocks are those of the sources drawn up, and numbers go on where they stood."""
    blend, taken = Blend(PHASES, BATCH, seed=1), Counter[int]()
    for phase, end in zip(PHASES, [*(phase.first for phase in PHASES[1:]), 120], strict=True):
        order = drawn_up(phase.shares, end - phase.first)
        for first in range(phase.first, end, BATCH):
            numbers = range(first, min(first + BATCH, end))
            assert blend.counts_before(numbers[-1]) == [taken[source] for source in range(3)]
            expected = []
            for source in order[first - phase.first : numbers.stop - phase.first]:
                expected.append((source, taken[source]))
                taken[source] += 1
            found = [blend.place(number) for number in numbers]
            assert sorted(found) == sorted(expected)
            if phase.shares.count(0.0) == 2:
                assert found == expected  # of one source: in its order
            assert blend.counts_after(first + 1) == blend.counts(numbers.stop) == [taken[source] for source in range(3)]
            within = Counter(source for source, _ in found[:2])
            assert blend.counts(first + 2) == [before + within[s] for s, before in enumerate(blend.counts_before(first))]


def test_the_order_inside_a_batch_is_drawn_from_seed_and_batch() -> None:
    def positions(seed: int, batch: int) -> list[int]:
        blend = Blend([Phase(0, (0.5, 0.5))], BATCH, seed)
        return [source for source, _ in (blend.place(batch * BATCH + place) for place in range(BATCH))]

    assert positions(1, 2) == positions(1, 2)
    drawn = {tuple(positions(seed, batch)) for seed in range(3) for batch in range(3)}
    assert len(drawn) > 5
    assert all(order.count(0) == BATCH // 2 for order in drawn)
