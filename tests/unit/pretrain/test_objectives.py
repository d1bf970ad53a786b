"""Weighted sums and means of losses against NumPy's."""

import numpy as np
import pytest
import torch

from data_pipeline.read.loader import Batch
from pretrain.objectives import NextToken, mean_weight, weighted_sum

CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(3)


def batch(weights_BS: torch.Tensor | None) -> Batch:
    tokens = torch.randint(9, (2, 5), generator=DRAW)
    return Batch(tokens, tokens, weights_BS)


def test_labels_without_weights_count_once() -> None:
    losses_BS = torch.rand(3, 4, generator=DRAW)
    total = weighted_sum(losses_BS, None)
    assert total.weight == 12
    assert torch.equal(total.over(12.0), losses_BS.mean())


def test_weights_scale_each_label() -> None:
    losses_BS, weights_BS = torch.rand(3, 4, generator=DRAW), torch.rand(3, 4, generator=DRAW)
    total = weighted_sum(losses_BS, weights_BS)
    expected = np.average(losses_BS.numpy().astype(np.float64), weights=weights_BS.numpy())
    assert float(total.loss / total.weight) == pytest.approx(expected, rel=1e-6)


def test_micro_batches_of_different_weight_give_the_mean_of_all_labels() -> None:
    weights = [torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]), torch.rand(2, 5, generator=DRAW), torch.ones(2, 5)]
    losses = [torch.rand(2, 5, generator=DRAW) for _ in weights]
    batches = [batch(weights_BS) for weights_BS in weights]
    mean = mean_weight(batches, CPU)
    shares = [weighted_sum(losses_BS, part.weights).over(mean) for losses_BS, part in zip(losses, batches, strict=True)]
    expected = np.average(torch.stack(losses).numpy().astype(np.float64), weights=torch.stack(weights).numpy())
    assert float(torch.stack(shares).mean()) == pytest.approx(expected, rel=1e-6)


def test_a_step_without_any_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="no label"):
        mean_weight([batch(torch.zeros(2, 5))], CPU)


def test_next_token_asks_for_the_loss_of_each_label() -> None:
    given = batch(None)
    asked = NextToken().losses(lambda tokens, labels: (tokens * 10 + labels).float(), given, CPU)
    assert torch.equal(asked, (given.tokens * 10 + given.labels).float())
