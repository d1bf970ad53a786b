"""The mean loss of held-out text, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from data_pipeline.read.loader import Batch
from pretrain.loop.evaluate import Evaluation, evaluate
from pretrain.objectives.base import WeightedSum, weighted_sum
from tests.unit.pretrain.loop.engine import Held

CPU = torch.device("cpu")


def loss(batch: Batch) -> WeightedSum:
    """The loss of a label is the label."""
    return weighted_sum(batch.labels.float(), batch.weights)


@pytest.mark.parametrize("data_size", [1, 3])
def test_every_label_counts_once(data_size: int) -> None:
    """One of three equal shares, as the mean over three ranks with it would give it."""
    result = evaluate(loss, Held([[1, 2], [3, 4], [5, 9]]), CPU, data_size)
    assert result == Evaluation(24.0 * data_size, 6 * data_size)
    assert result.loss == 4


def test_labels_count_as_their_weights_say() -> None:
    """A row that only fills the last batch has weight 0."""
    result = evaluate(loss, Held([[1, 3], [5, 7]], [[1.0, 1.0], [1.0, 0.0]]), CPU)
    assert result == Evaluation(9.0, 3)
    assert result.loss == 3


@pytest.mark.parametrize("data_size", [1, 3])
def test_bits_per_byte_divides_by_the_text_of_all_ranks(data_size: int) -> None:
    """A label of loss ln 2 is one bit; here each stands for four bytes."""
    result = evaluate(
        lambda batch: weighted_sum(torch.full(batch.labels.shape, math.log(2)), batch.weights),
        Held([[1, 2], [3, 4]]),
        CPU,
        data_size,
        text_bytes=lambda batch: 4.0 * batch.labels.numel(),
    )
    assert result is not None
    assert result.text_bytes == 16 * data_size
    assert result.bits_per_byte == pytest.approx(0.25, rel=1e-7)
    assert Evaluation(1.0, 1.0).bits_per_byte is None


@pytest.mark.parametrize("weight", [0.5, 0.1, 1e-3])
def test_fractions_of_labels_are_not_rounded(weight: float) -> None:
    result = evaluate(loss, Held([[1, 2, 3]], [[weight] * 3]), CPU)
    assert result is not None
    assert (result.loss, result.weight) == (pytest.approx(2, rel=1e-15), pytest.approx(3 * weight, rel=1e-6))


def test_a_batch_without_weights_weighs_as_many_as_it_has_labels() -> None:
    weighted, unweighted = (next(iter(held)) for held in (Held([[2, 4]], [[0.5, 0.25]]), Held([[1, 7]])))
    assert evaluate(loss, [weighted, unweighted], CPU) == Evaluation(2 * 0.5 + 4 * 0.25 + 1 + 7, 2.75)


def test_labels_that_all_weigh_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="some must count"):
        evaluate(loss, Held([[1, 2]], [[0.0, 0.0]]), CPU)


def test_sums_are_exact_in_float64() -> None:
    """2**24 + 1 is no float32: in that type the sum, even that of one batch, would be another."""
    assert evaluate(loss, Held([[2**24, 1], [1, 1]]), CPU) == Evaluation(2.0**24 + 3, 4)


def test_giving_up_is_asked_after_each_batch() -> None:
    seen: list[int] = []

    def noted(batch: Batch) -> WeightedSum:
        seen.append(int(batch.labels[0, 0]))
        return loss(batch)

    assert evaluate(noted, Held([[1], [2], [3]]), CPU, give_up=lambda: len(seen) == 2) is None
    assert seen == [1, 2]
