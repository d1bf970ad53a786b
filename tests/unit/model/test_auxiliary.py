"""Auxiliary terms have the gradient of a loss that they are added to, and are counted once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.auxiliary import AuxiliaryLosses


def values() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(3, 3, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    return x, w


def layer(x: Tensor, w: Tensor, losses: AuxiliaryLosses) -> Tensor:
    out = torch.tanh(x @ w)
    out = losses.add(out, "square", out.square().mean())
    return losses.add(out, "weight", 0.5 * w.square().sum())


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradient_is_that_of_the_sum(recomputed: bool) -> None:
    x, w = values()
    losses = AuxiliaryLosses()
    losses.scale = 0.25
    out = checkpoint(layer, x, w, losses, use_reentrant=False) if recomputed else layer(x, w, losses)
    (0.25 * out.sin().sum()).backward()

    x_, w_ = values()
    out_ = torch.tanh(x_ @ w_)
    terms = {"square": out_.square().mean(), "weight": 0.5 * w_.square().sum()}
    (0.25 * (out_.sin().sum() + sum(terms.values()))).backward()
    torch.testing.assert_close(x.grad, x_.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(w.grad, w_.grad, rtol=0, atol=1e-14)
    found = losses.take()
    assert found.keys() == terms.keys()
    for name, term in terms.items():
        assert float(found[name]) == pytest.approx(float(term))
    assert losses.take() == {}


def test_terms_of_layers_and_micro_batches_add_up() -> None:
    losses = AuxiliaryLosses()
    for _ in range(3):
        x, w = values()
        layer(layer(x, w, losses), w, losses).sum().backward()
    assert float(losses.take()["weight"]) == pytest.approx(6 * float(0.5 * values()[1].square().sum()))


def test_without_a_backward_pass_nothing_is_counted() -> None:
    losses = AuxiliaryLosses()
    with torch.no_grad():
        layer(*values(), losses)
    assert losses.take() == {}


def test_a_term_is_a_scalar() -> None:
    x, _ = values()
    with pytest.raises(ValueError, match=r"the loss term rows has the shape \(3,\); it must be a scalar"):
        AuxiliaryLosses().add(x, "rows", x.sum(1))


def test_sums_are_those_that_are_taken_later() -> None:
    losses = AuxiliaryLosses()
    for _ in range(2):
        layer(*values(), losses).sum().backward()
        seen = losses.sums()
    assert seen == losses.take()
    assert losses.sums() == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_spoils_all_gradients_before_it(value: float) -> None:
    """Also one that depends on nothing, whose own gradient would be 0."""
    x, w = values()
    losses = AuxiliaryLosses()
    losses.add(torch.tanh(x @ w), "term", torch.tensor(value)).sum().backward()
    assert x.grad is not None
    assert x.grad.isnan().all()
    assert math.isnan(float(losses.take()["term"])) == math.isnan(value)
