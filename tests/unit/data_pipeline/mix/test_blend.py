"""The order of a mixture against one that is drawn up sample by sample."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from data_pipeline.mix.blend import Blend, Phase, apportioned, next_source

BATCH = 8


def drawn_up(weights: Sequence[float], samples: int) -> list[int]:
    """The sources of the first samples: a queue of each source's next place."""
    queue = [(0.5 / weight, source, 0) for source, weight in enumerate(weights) if weight]
    heapq.heapify(queue)
    found = []
    for _ in range(samples):
        _, source, number = heapq.heappop(queue)
        found.append(source)
        heapq.heappush(queue, ((number + 1.5) / weights[source], source, number + 1))
    return found


def drawn_weights(seed: int) -> list[float]:
    draw = random.Random(seed)
    return [1.0, *(draw.choice([1, 1, 2, 0.1, 0.3, 1e-3, 0, draw.random()]) for _ in range(draw.randrange(6)))]


@pytest.mark.parametrize("seed", range(40))
def test_shares_of_any_number_of_samples(seed: int) -> None:
    weights, counts = drawn_weights(seed), Counter[int]()
    for number, source in enumerate(drawn_up(weights, 300)):
        found = apportioned(weights, number)
        assert found == tuple(counts[other] for other in range(len(weights)))
        assert next_source(weights, found) == source
        counts[source] += 1


def test_far_away_shares_are_exact_and_cheap() -> None:
    weights, samples = (0.7, 0.2, 0.1), 10**12
    assert apportioned(weights, samples) == (7 * 10**11, 2 * 10**11, 10**11)


PHASES = [Phase(0, (0.7, 0.3, 0.0)), Phase(3, (0.0, 1.0, 0.0)), Phase(5, (0.2, 0.2, 0.6))]


def test_each_sample_of_a_source_comes_once_and_in_its_turn() -> None:
    """Over changes of the weights: batches are those of the sources drawn up, and numbers go on where they stood."""
    blend, taken = Blend(PHASES, BATCH, seed=1), Counter[int]()
    for number, phase in enumerate(PHASES):
        steps = (PHASES[number + 1].from_step if number + 1 < len(PHASES) else 9) - phase.from_step
        order = drawn_up(phase.weights, steps * BATCH)
        for step in range(steps):
            first = (phase.from_step + step) * BATCH
            assert blend.counts_before(first + 3) == tuple(taken[source] for source in range(3))
            expected = []
            for source in order[step * BATCH : (step + 1) * BATCH]:
                expected.append((source, taken[source]))
                taken[source] += 1
            found = [blend.place(sample) for sample in range(first, first + BATCH)]
            assert sorted(found) == sorted(expected)
            if phase.weights.count(0.0) == 2:
                assert found == expected  # of one source: in its order
            assert blend.counts_after(first + 1) == tuple(taken[source] for source in range(3))


def test_the_order_inside_a_batch_is_drawn_from_seed_and_batch() -> None:
    def positions(seed: int, batch: int) -> list[int]:
        blend = Blend([Phase(0, (0.5, 0.5))], BATCH, seed)
        return [source for source, _ in (blend.place(batch * BATCH + place) for place in range(BATCH))]

    assert positions(1, 2) == positions(1, 2)
    drawn = {tuple(positions(seed, batch)) for seed in range(3) for batch in range(3)}
    assert len(drawn) > 5
    assert all(order.count(0) == BATCH // 2 for order in drawn)
