"""Differential attention of the manyheads decoder for transformers. Exported folders hold a copy of this file.

Each head subtracts a second softmax map from the first:

    diff      head_i = (1 − λ_init) RMSNorm((A¹_i − λ A²_i) V_i)     λ learned for the layer     (arXiv 2410.05258)
    diff_v2   head_i = (A¹_i − sigmoid(λ_i) A²_i) V                 λ_i = x W_λ

Attention implementations see 2 N heads: the maps of a head are neighbours, and read the same keys and values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_manyheads import ManyheadsAttention, Rotary, rotate, split_heads
from .configuration_manyheads import ManyheadsConfig


class ManyheadsLambdas(nn.Module):
    """exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) of a layer's four vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (nn.Parameter(torch.zeros(width)) for _ in range(4))

    def forward(self) -> Tensor:
        """A number, float32 or wider."""
        wide = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (vector.to(wide) for vector in self.parameters())
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp()


class ManyheadsTwoMapsAttention(ManyheadsAttention):
    """What both versions share: 2 N query heads on K heads of keys and values, and how outputs are subtracted."""

    def add_projections(self, config: ManyheadsConfig) -> None:
        self.num_key_value_groups = 2 * self.num_heads // self.kept_heads
        self.key_value = nn.Linear(config.hidden_size, self.kept_heads * 2 * self.head_dim, config.bias)

    def attended(
        self, hidden_states: Tensor, rotary: Rotary | None, attention_mask: Tensor | None, *others: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None and self.config.layer_position(self.layer_idx) == "alibi":  # a bias for each head
            attention_mask = attention_mask.repeat_interleave(2, dim=1)
        maps_BSMD, weights = super().attended(hidden_states, rotary, attention_mask, *others, **kwargs)
        first, second = maps_BSMD.unflatten(2, (self.num_heads, 2)).unbind(3)
        return self.subtract(first, second, hidden_states), weights

    def sinks(self) -> Tensor | None:
        """That of a head, for both of its maps."""
        return None if self.sink is None else self.sink.repeat_interleave(2, dim=0)

    def subtract(self, first_BSND: Tensor, second_BSND: Tensor, x_BSH: Tensor) -> Tensor:
        """The outputs of heads, from those of their maps."""
        raise NotImplementedError


class ManyheadsDifferentialAttention(ManyheadsTwoMapsAttention):
    """diff: maps of the two halves of a head's queries and keys. A query has zeros for the other half."""

    def add_projections(self, config: ManyheadsConfig) -> None:
        super().add_projections(config)
        half = self.head_dim // 2
        self.scaling = half**-0.5
        self.query = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, config.bias)
        if config.qk_norm:
            self.query_norm, self.key_norm = (nn.RMSNorm(half, config.norm_epsilon) for _ in range(2))
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * self.layer_idx)
        self.lambdas = ManyheadsLambdas(half)
        self.head_norm = nn.RMSNorm(self.head_dim, config.norm_epsilon)

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        k_BKSD, v_BKSD = split_heads(self.key_value(x_BSH), 2 * self.head_dim).chunk(2, dim=-1)
        q_BNSD = split_heads(self.query(x_BSH), self.head_dim)
        first, second = self.halves(q_BNSD, self.query_norm, rotary)
        padding = self.head_dim // 2
        q_BMSD = torch.stack([F.pad(first, (0, padding)), F.pad(second, (padding, 0))], dim=2).flatten(1, 2)
        return q_BMSD, torch.cat(self.halves(k_BKSD, self.key_norm, rotary), dim=-1), v_BKSD

    def halves(self, x_BNSD: Tensor, norm: nn.Module, rotary: Rotary | None) -> list[Tensor]:
        """Both halves of the channels, normed and rotated by themselves."""
        return [rotate(norm(half_BNSC), rotary) for half_BNSC in x_BNSD.chunk(2, dim=-1)]

    def subtract(self, first_BSND: Tensor, second_BSND: Tensor, x_BSH: Tensor) -> Tensor:
        factor = (self.lambdas() + self.lambda_init).to(second_BSND.dtype)
        normed: Tensor = self.head_norm(first_BSND - factor * second_BSND)
        return normed * (1 - self.lambda_init)


class ManyheadsDifferentialAttentionV2(ManyheadsTwoMapsAttention):
    """diff_v2: two queries for each head, and a λ for each token and head."""

    def add_projections(self, config: ManyheadsConfig) -> None:
        super().add_projections(config)
        self.query = nn.Linear(config.hidden_size, 2 * self.num_heads * self.head_dim, config.bias)
        self.lambdas = nn.Linear(config.hidden_size, self.num_heads, config.bias)

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        k_BKSD, v_BKSD = split_heads(self.key_value(x_BSH), 2 * self.head_dim).chunk(2, dim=-1)
        q_BMSD = split_heads(self.query(x_BSH), self.head_dim)
        return rotate(self.query_norm(q_BMSD), rotary), rotate(self.key_norm(k_BKSD), rotary), v_BKSD

    def subtract(self, first_BSND: Tensor, second_BSND: Tensor, x_BSH: Tensor) -> Tensor:
        return first_BSND - self.lambdas(x_BSH).sigmoid()[..., None] * second_BSND


DIFFERENTIAL: dict[str, type[ManyheadsAttention]] = {
    "diff": ManyheadsDifferentialAttention,
    "diff_v2": ManyheadsDifferentialAttentionV2,
}
