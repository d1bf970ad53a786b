"""Weighted sums and means of losses against NumPy's."""

import math

import numpy as np
import pytest
import torch

from pretrain.objectives.base import Examples, WeightedSum, mean_weight, weighted_sum

CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(3)


def examples(weights_BS: torch.Tensor | None) -> Examples:
    tokens = torch.randint(9, (2, 5), generator=DRAW)
    return Examples(tokens, tokens, weights_BS)


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


def test_sums_are_float64_without_gradient_and_of_the_losses_type_with_it() -> None:
    losses_BS, weights_BS = torch.full((1, 3), 0.1, requires_grad=True), torch.full((1, 3), 0.5)
    assert weighted_sum(losses_BS, weights_BS).loss.dtype == torch.float32
    with torch.no_grad():
        total = weighted_sum(losses_BS, weights_BS)
    assert total.loss.item() == pytest.approx(1.5 * float(torch.tensor(0.1)), rel=1e-15)


def test_an_evaluation_has_sums_of_each_example() -> None:
    losses_BS, weights_BS = (torch.rand(3, 4, generator=DRAW) for _ in range(2))
    with torch.no_grad():
        weighted, unweighted = weighted_sum(losses_BS, weights_BS), weighted_sum(losses_BS, None)
    losses, weights = losses_BS.numpy().astype(np.float64), weights_BS.numpy().astype(np.float64)
    np.testing.assert_allclose(weighted.pair().numpy(), [(losses * weights).sum(1), weights.sum(1)], rtol=1e-14)
    np.testing.assert_allclose(unweighted.pair().numpy(), [losses.sum(1), [4, 4, 4]], rtol=1e-14)


@pytest.mark.parametrize("weight", [0.75, torch.tensor(0.75)])
def test_a_pair_has_both_sums(weight: torch.Tensor | float) -> None:
    pair = WeightedSum(torch.tensor(1.5), weight).pair()
    assert (pair.tolist(), pair.dtype) == ([1.5, 0.75], torch.float64)


def test_micro_batches_of_different_weight_give_the_mean_of_all_labels() -> None:
    weights = [torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]), torch.rand(2, 5, generator=DRAW), torch.ones(2, 5)]
    losses = [torch.rand(2, 5, generator=DRAW) for _ in weights]
    step = [examples(weights_BS) for weights_BS in weights]
    mean = mean_weight(step, CPU)
    shares = [weighted_sum(losses_BS, part.weights).over(mean) for losses_BS, part in zip(losses, step, strict=True)]
    expected = np.average(torch.stack(losses).numpy().astype(np.float64), weights=torch.stack(weights).numpy())
    assert float(torch.stack(shares).mean()) == pytest.approx(expected, rel=1e-6)


def test_a_micro_batch_without_weights_weighs_as_many_as_it_has_labels() -> None:
    assert mean_weight([examples(None), examples(torch.full((2, 5), 0.5))], CPU) == (10 + 5) / 2


def test_a_step_without_any_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="some must count"):
        mean_weight([examples(torch.zeros(2, 5))], CPU)


def test_all_inputs_of_examples_move() -> None:
    tokens = torch.zeros(2, 5)
    moved = Examples((tokens, tokens), tokens, tokens).to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in (*moved.inputs, moved.labels, moved.weights))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float) -> None:
    losses_BS = torch.zeros(1, 2, requires_grad=True)
    share = weighted_sum(losses_BS + torch.tensor([[0.0, value]]), None).over(2.0)
    share.backward()
    assert losses_BS.grad is not None
    assert losses_BS.grad.isnan().all()
    assert math.isnan(share) if math.isnan(value) else share == value


def test_a_finite_loss_has_its_gradient_to_the_bit() -> None:
    losses_BS = torch.rand(3, 4, generator=DRAW).requires_grad_()
    weights_BS = torch.rand(3, 4, generator=DRAW)
    weighted_sum(losses_BS, weights_BS).over(0.7).backward()
    assert losses_BS.grad is not None
    assert torch.equal(losses_BS.grad, weights_BS * (1 / torch.tensor(0.7)))
