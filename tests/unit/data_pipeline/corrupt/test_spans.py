"""Span corruption: exact examples, and texts put together again from inputs and targets."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest

from configs.schema import SpansConfig
from data_pipeline.corrupt.draws import draws
from data_pipeline.corrupt.spans import SpanCorruption, corrupt, noise_mask, sentinel_names

SENTINELS = np.array([101, 102, 103, 104])


def restored(inputs: list[int], targets: list[int], sentinels: set[int]) -> list[int]:
    """The text: each sentinel of the inputs stands for what follows it in the targets."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in sentinels:
            current = spans[token] = []
        else:
            current.append(token)
    return [token for place in inputs for token in (spans[place] if place in sentinels else [place])]


def test_an_example_by_hand() -> None:
    """That of the T5 paper: thank you <X> me to your party <Y> week."""
    noise = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
    inputs, targets = corrupt(np.arange(10), noise, SENTINELS)
    assert inputs.tolist() == [0, 1, 101, 4, 5, 6, 7, 102, 9]
    assert targets.tolist() == [101, 2, 3, 102, 8]


def test_a_span_at_the_beginning_and_at_the_end() -> None:
    inputs, targets = corrupt(np.arange(5), np.array([1, 1, 0, 0, 1], bool), SENTINELS)
    assert (inputs.tolist(), targets.tolist()) == ([101, 2, 3, 102], [101, 0, 1, 102, 4])


@pytest.mark.parametrize(("length", "share", "mean"), [(2, 0.15, 3), (7, 0.5, 1), (64, 0.15, 3), (513, 0.5, 8), (64, 0.99, 1)])
def test_round_trip(length: int, share: float, mean: float) -> None:
    rules = SpansConfig(share=share, mean_length=mean)
    special = {name: 1000 + number for number, name in enumerate(sentinel_names(rules, length))}
    corruption, sizes = SpanCorruption(rules, length, special), set()
    for seed in range(30):
        tokens = np.random.default_rng(seed).integers(0, 100, length)
        inputs, targets = corruption(tokens, draws(seed))
        assert restored(inputs.tolist(), targets.tolist(), set(special.values())) == tokens.tolist()
        assert [token for token in inputs if token >= 1000] == [token for token in targets if token >= 1000]
        sizes.add((len(inputs), len(targets)))
    corrupted, spans = rules.counts(length)
    assert sizes == {(length - corrupted + spans, corrupted + spans)}
    assert len(special) == spans


def test_counts_are_those_of_t5() -> None:
    """`random_spans_helper` of T5 for 568 tokens: inputs of 512 and targets of 114 with an end each."""
    corrupted, spans = SpansConfig().counts(568)
    assert (568 - corrupted + spans + 1, corrupted + spans + 1) == (512, 114)


def test_noise_has_so_many_tokens_in_so_many_spans() -> None:
    means = np.zeros(60)
    for seed in range(400):
        noise = noise_mask(60, 15, 5, draws(seed))
        assert (len(noise), noise.sum()) == (60, 15)
        assert [kind for kind, _ in groupby(noise.tolist())] == [False, True] * 5
        means += noise
    assert means[0] == 0
    assert means[-1] == 400
    assert abs(means[5:50] / 400 - 0.25).max() < 0.12, "spans are everywhere"
