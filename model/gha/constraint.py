"""What an attention layer calls when its heads are grouped: it observes the heads and adds a constraint to the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.gha.gram import attention_gram, output_gram
from model.gha.losses import categorical, continuous
from model.layers import Layers
from model.positions.positions import Positions

TERM = "gha"  # the name of the constraint among auxiliary losses


@dataclass(frozen=True)
class FeatureMaps:
    """What one pass of a layer exposes of its heads besides their outputs; the functions cost nothing until called.

    `values` (B, K, T, D), shared or per head, are what `value_gram` computes G_NN from. `queries` computes those of some rows
    (R,), (B, N, R, D), for scores with the `keys` (B, K, T, D), multiplied by `scale`.
    """

    positions: Positions
    scale: float
    values: Tensor
    value_gram: Callable[[Tensor], Tensor]
    queries: Callable[[Tensor], Tensor]
    keys: Tensor


class HeadConstraint:
    """The heads of one layer: their Gram matrix in each pass, and the group constraint once groups and weights are set."""

    def __init__(self, layers: Layers, head_dim: int, feature_map: str, loss: str, attention_rows: int) -> None:
        self.layers, self.head_dim, self.feature_map, self.attention_rows = layers, head_dim, feature_map, attention_rows
        self.loss = continuous if loss == "continuous" else categorical
        self.labels_N: Tensor | None = None  # group of each head, on the device of the model
        self.groups = 0
        self.alpha = self.beta = 0.0  # weights of this layer's term in the loss
        self.training = True  # observe passes with a gradient; False: passes without one, as in a vote
        self._observed: list[Tensor] = []

    @torch.compiler.disable
    def __call__(self, heads_SBF: Tensor, maps: FeatureMaps) -> Tensor:
        """This rank's heads, (S, B, N·D), unchanged; the constraint's gradient enters here in the backward pass."""
        if torch.is_grad_enabled() != self.training:
            return heads_SBF
        gram_NN = self.gram(heads_SBF, maps)
        if not self.training:
            self.observe(gram_NN)
            return heads_SBF
        if self.labels_N is not None and (self.alpha or self.beta):
            term = self.loss(gram_NN, self.labels_N, self.groups, self.alpha, self.beta)
            heads_SBF = self.layers.auxiliary.add(heads_SBF, TERM, term.to(torch.float32))
        observed: Tensor = _Observe.apply(heads_SBF, gram_NN.detach(), self)
        return observed

    def gram(self, heads_SBF: Tensor, maps: FeatureMaps) -> Tensor:
        """G_NN of the configured feature map, for all heads of all ranks."""
        if self.feature_map == "value":
            return maps.value_gram(maps.values)
        if self.feature_map == "output":
            return output_gram(heads_SBF, self.head_dim, self.layers)
        return attention_gram(
            maps.queries,
            maps.keys,
            maps.positions,
            heads=heads_SBF.shape[-1] // self.head_dim,
            scale=maps.scale,
            rows=self.attention_rows,
            layers=self.layers,
        )

    def observe(self, gram_NN: Tensor) -> None:
        """Store the Gram matrix of one pass."""
        self._observed.append(gram_NN)

    def take(self) -> Tensor:
        """G_NN summed over the passes of this rank since the last call, float64."""
        total_NN = torch.stack(self._observed).sum(0)
        self._observed.clear()
        return total_NN


class _Observe(torch.autograd.Function):
    """The identity. Its backward pass stores the Gram matrix, once even with recomputed activations."""

    @staticmethod
    def forward(ctx: Any, x_SBF: Tensor, gram_NN: Tensor, constraint: HeadConstraint) -> Tensor:
        ctx.gram_NN, ctx.constraint = gram_NN, constraint
        return x_SBF.view_as(x_SBF)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.constraint.observe(ctx.gram_NN)
        return gradients[0], None, None
