"""Differential attention: each head subtracts a second softmax map from the first, which cancels what both attend to alike.

    diff      head_i = (1 − λ_init) RMSNorm((A¹_i − λ A²_i) V_i)     λ learned for the layer     (Ye et al., arXiv 2410.05258)
    diff_v2   head_i = (A¹_i − sigmoid(λ_i) A²_i) V                 λ_i = x W_λ                  (Ye et al. 2026)

Both maps of a head weigh the same values, so a kernel computes them as two heads of one group, neighbours, and their outputs
are subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.base import SINK, Attention, Own, Projected
from model.attention.head_norm import HeadNorm
from model.heads import split_heads
from model.layers import Layers
from model.positions.positions import Positions
from model.positions.rotary import rotate


class Differential(Attention):
    """Heads with two maps; `query_features` gives the queries of both, neighbours among 2 N heads."""

    def maps(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions, kernel: str) -> Tensor:
        """What the maps of each head make of its values, (S, B, N, 2, D)."""
        if SINK in own:  # of a head, for both of its maps
            own = {**own, SINK: own[SINK].repeat_interleave(2, dim=0)}
        maps_SBF = super().heads(q_BNSD, k_BKTD, v_BKTD, own, positions.of_maps(2), kernel)
        return maps_SBF.unflatten(-1, (-1, 2, self.head_dim))


class DifferentialAttention(Differential):
    """V1. A head's queries and keys are two halves of head_dim / 2 channels, with a map each; λ and the norm serve all heads.

    The queries of a map have zeros for the other's half, so that one key of head_dim channels, as wide as values, serves both:
    fused kernels want equal widths, and no key or value is copied.
    """

    def build(self, config: ModelConfig, layers: Layers) -> None:
        half = self.head_dim // 2
        self.scale = half**-0.5
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * self.number)  # l − 1 of the paper, whose layers count from 1
        self.lambdas = Lambdas(layers, half)
        self.head_norm = HeadNorm(layers, self.head_dim, config.norm_epsilon)

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        return self.by_halves(split_heads(projected["query"], self.head_dim), self.query_norm, positions)

    def split_keys_values(self, projected: Projected, positions: Positions) -> tuple[Tensor, Tensor]:
        k_BKSD, v_BKSD = split_heads(projected["key_value"], 2 * self.head_dim).chunk(2, dim=-1)
        return self.by_halves(k_BKSD, self.key_norm, positions), v_BKSD

    def by_halves(self, x_BNSD: Tensor, norm: Callable[[Tensor], Tensor], positions: Positions) -> Tensor:
        """Each half of the channels normed and rotated by itself."""
        halves = norm(x_BNSD.unflatten(-1, (2, -1))).unbind(-2)
        return torch.cat([rotate(half_BNSC, positions) for half_BNSC in halves], dim=-1)

    def query_features(self, q_BNSD: Tensor, own: Own, positions: Positions) -> Tensor:
        first, second = q_BNSD.chunk(2, dim=-1)
        half = self.head_dim // 2
        return torch.stack([F.pad(first, (0, half)), F.pad(second, (half, 0))], dim=2).flatten(1, 2)

    def heads(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions, kernel: str) -> Tensor:
        first, second = self.maps(q_BNSD, k_BKTD, v_BKTD, own, positions, kernel).unbind(-2)
        heads_SBND = first - (self.lambdas() + self.lambda_init).to(second.dtype) * second
        normed: Tensor = self.head_norm(heads_SBND) * (1 - self.lambda_init)
        return normed.flatten(2)


class Lambdas(nn.Module):
    """exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) of a layer's four vectors, which all heads read."""

    def __init__(self, layers: Layers, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (nn.Parameter(torch.zeros(width)) for _ in range(4))

    def forward(self) -> Tensor:
        """A number, float32 or wider."""
        wide = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (vector.to(wide) for vector in self.layers.replicated(*self.parameters()))
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp()


class DifferentialAttentionV2(Differential):
    """V2. A head has two queries of head_dim channels, on the same keys and values, and a λ for each token.

    `queries` holds all of a head side by side, its λ last: (B, N, S, 2 D + 1).
    """

    of_queries = ("query", "lambdas")

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        q_BMSD = rotate(self.query_norm(split_heads(projected["query"], self.head_dim)), positions)
        return torch.cat([q_BMSD[:, 0::2], q_BMSD[:, 1::2], split_heads(projected["lambdas"], 1)], dim=-1)

    def query_features(self, q_BNSF: Tensor, own: Own, positions: Positions) -> Tensor:
        return torch.stack(q_BNSF[..., :-1].chunk(2, dim=-1), dim=2).flatten(1, 2)

    def heads(self, q_BNSF: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions, kernel: str) -> Tensor:
        first, second = self.maps(q_BNSF, k_BKTD, v_BKTD, own, positions, kernel).unbind(-2)
        lambdas_SBN1 = q_BNSF[..., -1:].permute(2, 0, 1, 3)
        return (first - lambdas_SBN1.sigmoid() * second).flatten(2)
