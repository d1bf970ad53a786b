"""Best-fit packing against the algorithm written out piece by piece."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from data_pipeline.read.pack import Move, PackedOrder, packed_order, piece_counts, plan, sample_count

CAPACITIES = (1, 2, 7, 16, 33)


def drawn(seed: int, documents: int = 120, longest: int = 60) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.minimum(1 + draw.geometric(0.06, documents), longest).astype(np.int32)


def best_fit(lengths: np.ndarray, capacity: int) -> Counter[int]:
    """The tokens in samples: one piece after the other, the longest first, goes into the fullest with room."""
    pieces = [min(capacity, n - start) for n in map(int, lengths) for start in range(0, n, capacity)]
    samples: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [number for number, filled in enumerate(samples) if filled + piece <= capacity]
        if fitting:
            samples[max(fitting, key=samples.__getitem__)] += piece
        else:
            samples.append(piece)
    return Counter(samples)


def packed(lengths: np.ndarray, capacity: int, seed: int = 5) -> PackedOrder:
    return packed_order(lengths, capacity, plan(piece_counts(lengths, capacity), capacity), seed)


def contents(order: PackedOrder, lengths: np.ndarray, capacity: int) -> list[list[tuple[int, int, int]]]:
    """(document, start, length) of the pieces of each sample."""
    pieces = [
        (int(document), int(start), min(capacity, int(lengths[document]) - int(start)))
        for document, start in zip(order.document, order.start, strict=True)
    ]
    return [pieces[begin:end] for begin, end in zip(order.first, order.first[1:], strict=False)]


def digest(order: PackedOrder) -> str:
    arrays = (order.document, order.start, order.first)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_best_fit_with_the_longest_piece_first(capacity: int, seed: int) -> None:
    lengths = drawn(seed)
    samples = contents(packed(lengths, capacity), lengths, capacity)
    assert Counter(sum(length for _, _, length in sample) for sample in samples) == best_fit(lengths, capacity)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_every_token_is_in_one_sample_and_only_long_documents_are_split(capacity: int) -> None:
    lengths = drawn(7)
    samples = contents(packed(lengths, capacity), lengths, capacity)
    seen = [np.zeros(length, np.int64) for length in lengths]
    for sample in samples:
        assert 0 < sum(length for _, _, length in sample) <= capacity
        for document, start, length in sample:
            seen[document][start : start + length] += 1
            assert length == lengths[document] or lengths[document] > capacity
            assert length == capacity or start + length == lengths[document], "only complete samples are cut off"
    assert all((times == 1).all() for times in seen)


def test_a_plan_by_hand() -> None:
    counts = np.zeros(11, np.int64)
    counts[[7, 6, 3, 2]] = 1, 1, 3, 1
    moves = [Move(7, 10, 1, 1), Move(6, 10, 1, 1), Move(3, 3, 1, 1), Move(3, 4, 1, 1), Move(3, 10, 1, 1), Move(2, 7, 1, 1)]
    assert plan(counts, 10) == moves
    assert sample_count(moves, 10) == 3


def test_seeds_and_nothing_else_change_the_order() -> None:
    lengths = np.arange(120, dtype=np.int32) ** 2 % 61 + 1
    first, again, other = packed(lengths, 16, 3), packed(lengths, 16, 3), packed(lengths, 16, 4)
    assert digest(first) == digest(again) == "b86a927bc49e4ae6", "runs that resume would read other samples: change VERSION"
    assert len(first.first) == len(other.first), "every epoch has as many samples"
    assert (first.document != other.document).mean() > 0.9


def test_documents_of_usual_lengths_fill_more_than_99_percent() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(np.int32) + 1
    for capacity in (512, 2048, 4096):
        samples = sample_count(plan(piece_counts(lengths, capacity), capacity), capacity)
        assert 1 - lengths.sum() / (samples * capacity) < 0.01, capacity
