"""Loss terms that layers add to the cross-entropy, on every layout.

A layer hands in a term where it arises; nothing is carried to the end of the model, so that pipeline stages, recomputation and
engines see the same activations as without it. The term's gradient enters where it was handed in, as Megatron's mixture of
experts does it (`MoEAuxLossAutoScaler`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AuxiliaryLosses:
    """The terms of one model on one rank."""

    def __init__(self) -> None:
        self.scale = 1.0  # of a micro-batch's loss in what the engine differentiates, such as 1 / accumulated micro-batches
        self._terms: dict[str, list[Tensor]] = {}

    def add(self, x: Tensor, name: str, term: Tensor) -> Tensor:
        """`x` itself; when a gradient comes back through it, `term` joins the loss.

        `term` is a scalar, the mean over this rank's micro-batch as the cross-entropy is; engines average it over micro-batches
        and data-parallel ranks. On tensor-parallel ranks it is the whole term on each, not a part. Terms of one name, of one
        layer or several, are added up. All data-parallel ranks add the same names in the same step.
        """
        if term.ndim:
            raise ValueError(f"the loss term {name} has the shape {tuple(term.shape)}; it must be a scalar")
        joined: Tensor = _Join.apply(x, term, name, self)
        return joined

    def take(self) -> dict[str, Tensor]:
        """Each term summed over layers and over the backward passes since the last call; not scaled."""
        sums = {name: torch.stack(terms).double().sum() for name, terms in sorted(self._terms.items())}
        self._terms.clear()
        return sums

    def record(self, name: str, term: Tensor) -> None:
        self._terms.setdefault(name, []).append(term)


class _Join(torch.autograd.Function):
    """The identity; its backward pass gives the term its gradient and records it: once, even with recomputed activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor, name: str, losses: AuxiliaryLosses) -> Tensor:
        ctx.term, ctx.name, ctx.losses = term.detach(), name, losses
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.losses.record(ctx.name, ctx.term)
        return gradients[0], torch.full_like(ctx.term, ctx.losses.scale), None, None
