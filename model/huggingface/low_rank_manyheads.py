"""Heads of low rank of the manyheads decoder for transformers. Exported folders hold a copy of this file.

    mfa            Q_i = norm(x S) W_i              K_i = k            V_i = v            (arXiv 2412.19255)
    mhe_low_rank   Q_i = q + x U W_i + e^Q_i        K_i = k + e^K_i    V_i = v + e^V_i
    tpa            Q_i = Σ_r a_ri(x) b_r(x) / R_Q   K_i and V_i likewise                  (arXiv 2501.06425)

S, U and W_i are weights; a_ri, a number, and b_r, a vector, are linear functions of the token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention_manyheads import (
    HEAD_EMBEDDINGS,
    ManyheadsAddAttention,
    ManyheadsAttention,
    ManyheadsGroupedQueryAttention,
    Rotary,
    rotate,
    split_heads,
)
from .configuration_manyheads import ManyheadsConfig


class ManyheadsMultiMatrixAttention(ManyheadsGroupedQueryAttention):
    """mfa: mqa whose queries come from a normed latent of the token."""

    def add_projections(self, config: ManyheadsConfig) -> None:
        assert config.query_rank is not None
        super().add_projections(config)
        self.query_down = nn.Linear(config.hidden_size, config.query_rank, config.bias)
        self.query_down_norm = nn.RMSNorm(config.query_rank, config.norm_epsilon)
        self.query = nn.Linear(config.query_rank, self.num_heads * self.head_dim, config.bias)

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q_BNSD = split_heads(self.query(self.query_down_norm(self.query_down(x_BSH))), self.head_dim)
        k_BKSD, v_BKSD = split_heads(self.key_value(x_BSH), 2 * self.head_dim).chunk(2, dim=-1)
        return rotate(self.query_norm(q_BNSD), rotary), rotate(self.key_norm(k_BKSD), rotary), v_BKSD


class ManyheadsLowRankAttention(ManyheadsAddAttention):
    """mhe_low_rank: mhe_add, with or without embeddings, whose heads add a product of low rank to the shared query."""

    def add_projections(self, config: ManyheadsConfig) -> None:
        super().add_projections(config)
        self.embeds = config.head_embeddings
        if not self.embeds:
            for name in HEAD_EMBEDDINGS:
                self.register_parameter(name, None)
        self.low_rank = bool(config.query_rank)
        if config.query_rank:
            self.query_down = nn.Linear(config.hidden_size, config.query_rank, config.bias)
            self.query = nn.Linear(config.query_rank, self.num_heads * self.head_dim, config.bias)

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.low_rank:
            return super().project(x_BSH, rotary)
        q_BGSD, k_BGSD, v_BGSD = split_heads(self.qkv(x_BSH), 3 * self.head_dim).chunk(3, dim=-1)
        own_BNSD = split_heads(self.query(self.query_down(x_BSH)), self.head_dim)
        q_BNSD = self.query_norm(q_BGSD.repeat_interleave(self.num_key_value_groups, dim=1) + own_BNSD)
        keys = self.keys(self.key_norm(k_BGSD), rotary)
        if not self.embeds:
            return rotate(q_BNSD, rotary), keys, v_BGSD
        e_key_N1D = None if self.key_embedding is None else self.key_embedding[:, None]
        return self.queries(q_BNSD, self.query_embedding[:, None], e_key_N1D, rotary), keys, v_BGSD

    def finish(self, heads_BSND: Tensor) -> Tensor:
        return super().finish(heads_BSND) if self.embeds else heads_BSND


class ManyheadsTensorProductAttention(ManyheadsAttention):
    """tpa: the cache stores, for each rank of keys and of values, the factors over heads and over channels side by side.

    All ranks are one head: static caches need as many heads of values as of keys.
    """

    def add_projections(self, config: ManyheadsConfig) -> None:
        query_rank, key_rank, value_rank = config.query_rank, config.key_rank, config.value_rank
        assert query_rank
        assert key_rank
        assert value_rank
        self.key_rank, self.num_key_value_groups = key_rank, 1
        for name, rank in (("query", query_rank), ("key_value", key_rank + value_rank)):
            of_heads = nn.Linear(config.hidden_size, self.num_heads * rank, config.bias)
            self.add_module(f"{name}_head_factors", of_heads)
            self.add_module(f"{name}_channel_factors", nn.Linear(config.hidden_size, rank * self.head_dim, config.bias))

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        (heads_BRSN, channels_BRSD), (own_BRSN, shared_BRSD) = (self.factors(x_BSH, name) for name in ("query", "key_value"))
        query = outer_products(heads_BRSN, rotate(channels_BRSD, rotary))
        rank = self.key_rank
        key_BRSF = torch.cat([own_BRSN[:, :rank], rotate(shared_BRSD[:, :rank], rotary)], dim=-1)
        value_BRSF = torch.cat([own_BRSN[:, rank:], shared_BRSD[:, rank:]], dim=-1)
        key, value = (factors_BRSF.transpose(1, 2).flatten(2)[:, None] for factors_BRSF in (key_BRSF, value_BRSF))
        return query, key, value

    def factors(self, x_BSH: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Factors over heads, (B, R, S, N), and over channels, (B, R, S, D)."""
        of_heads = self.get_submodule(f"{name}_head_factors")(x_BSH).unflatten(-1, (self.num_heads, -1))
        return of_heads.permute(0, 3, 1, 2), split_heads(self.get_submodule(f"{name}_channel_factors")(x_BSH), self.head_dim)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        sizes = [self.num_heads, self.head_dim]
        of_ranks = (split_heads(kept_B1TF[:, 0], sum(sizes)) for kept_B1TF in (key, value))
        k_BNTD, v_BNTD = (outer_products(*factors_BRTF.split(sizes, dim=-1)) for factors_BRTF in of_ranks)
        return super().attend(query, k_BNTD, v_BNTD, attention_mask, **kwargs)


def outer_products(heads_BRSN: Tensor, channels_BRSD: Tensor) -> Tensor:
    """The mean over ranks of the outer products of both factors, (B, N, S, D)."""
    return torch.einsum("brsn,brsd->bnsd", heads_BRSN / heads_BRSN.shape[1], channels_BRSD)


LOW_RANK: dict[str, type[ManyheadsAttention]] = {
    "mfa": ManyheadsMultiMatrixAttention,
    "mhe_low_rank": ManyheadsLowRankAttention,
    "tpa": ManyheadsTensorProductAttention,
}
