"""The mean loss of held-out text, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data_pipeline.read.loader import Batch
from pretrain.loop.evaluate import Evaluation, evaluate
from tests.unit.pretrain.loop.engine import Held

CPU = torch.device("cpu")


def losses(batch: Batch) -> Tensor:
    return batch.labels.float()


@pytest.mark.parametrize("data_size", [1, 3])
def test_every_label_counts_once(data_size: int) -> None:
    """One of three equal shares, as the mean over three ranks with it would give it."""
    result = evaluate(losses, Held([[1, 2], [3, 4], [5, 9]]), CPU, data_size)
    assert result == Evaluation(24.0 * data_size, 6 * data_size)
    assert result.loss == 4


def test_labels_count_as_their_weights_say() -> None:
    """A row that only fills the last batch has weight 0."""
    result = evaluate(losses, Held([[1, 3], [5, 7]], [[1.0, 1.0], [1.0, 0.0]]), CPU)
    assert result == Evaluation(9.0, 3)
    assert result.loss == 3


def test_sums_are_exact_in_float64() -> None:
    """2**24 + 1 is no float32: in that type the sum, even that of one batch, would be another."""
    assert evaluate(losses, Held([[2**24, 1], [1, 1]]), CPU) == Evaluation(2.0**24 + 3, 4)


def test_giving_up_is_asked_after_each_batch() -> None:
    seen: list[int] = []

    def noted(batch: Batch) -> Tensor:
        seen.append(int(batch.labels[0, 0]))
        return losses(batch)

    assert evaluate(noted, Held([[1], [2], [3]]), CPU, give_up=lambda: len(seen) == 2) is None
    assert seen == [1, 2]
