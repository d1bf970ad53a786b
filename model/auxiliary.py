"""Loss terms that layers add to the loss of the objective, on every layout.

A layer adds a term where it arises; nothing is carried to the end of the model, so that pipeline stages, recomputation and
engines see the same activations as without it. The term's gradient starts where the term was added, as in Megatron's mixture
of experts (`MoEAuxLossAutoScaler`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AuxiliaryLosses:
    """The terms of one model on one rank."""

    def __init__(self) -> None:
        self.scale = 1.0  # factor of a micro-batch's loss in what the engine differentiates, e.g. 1 / accumulated micro-batches
        self._terms: dict[str, list[Tensor]] = {}

    def add(self, x: Tensor, name: str, term: Tensor) -> Tensor:
        """Return `x`; its backward pass adds `term` to the loss.

        `term` is a scalar: like the objective's loss, a mean over this rank's micro-batch. Engines average it over
        micro-batches and data-parallel ranks. Every tensor-parallel rank passes the full term, not a part of it. Terms of one
        name, from one layer or several, are summed. All data-parallel ranks add the same names in the same step.
        """
        if term.ndim:
            raise ValueError(f"the loss term {name} has the shape {tuple(term.shape)}; it must be a scalar")
        joined: Tensor = _AddTerm.apply(x, term, name, self)
        return joined

    def sums(self) -> dict[str, Tensor]:
        """Each term, unscaled, summed over layers and over the backward passes since the last `take`."""
        return {name: torch.stack(terms).double().sum() for name, terms in sorted(self._terms.items())}

    def take(self) -> dict[str, Tensor]:
        """`sums`, which start anew."""
        sums = self.sums()
        self._terms.clear()
        return sums

    def record(self, name: str, term: Tensor) -> None:
        self._terms.setdefault(name, []).append(term)


class _AddTerm(torch.autograd.Function):
    """The identity. Its backward pass records the term and gives it its gradient, once even with recomputed activations.

    Of a term that is not finite, all gradients from here on are NaN: so the gradient norm tells all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor, name: str, losses: AuxiliaryLosses) -> Tensor:
        ctx.term, ctx.name, ctx.losses = term.detach(), name, losses
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.losses.record(ctx.name, ctx.term)
        factor = factor_of(ctx.term)
        return gradients[0] * factor.to(gradients[0].dtype), factor * ctx.losses.scale, None, None


def factor_of(loss: Tensor) -> Tensor:
    """1, or NaN if `loss` is not finite; computed where it is, without a look at it."""
    return 1 + 0 * loss.detach()
