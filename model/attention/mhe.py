"""Multiple Head Embeddings (MHE, arXiv 2310.07911): one shared projection each of Q, K and V; heads differ by three embeddings.

    ADD   Q_i = q + e^Q_i         K_i = k + e^K_i         V_i = v + e^V_i
    MUL   Q_i = q ⊙ (1 + e^Q_i)   K_i = k ⊙ (1 + e^K_i)   V_i = v ⊙ (1 + e^V_i)

Neither K_i nor V_i is ever made. Every variant is written as exact multi-query attention: what belongs to a head moves from its
keys to its queries and from its values to its output (rows of softmax sum to 1). docs/attention.md derives each step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.kernels import attend, merge_heads, split_heads
from model.layers import LinearBuilders
from model.positions import Positions, rotate

HEAD_EMBEDDINGS = ("query_embedding", "key_embedding", "value_embedding")


class MHEAttention(nn.Module):
    """What ADD and MUL share: parameters and the way through multi-query attention."""

    def __init__(self, config: ModelConfig, builders: LinearBuilders) -> None:
        super().__init__()
        self.head_dim = config.head_width
        # The embeddings enter before the rotation: only then do keys need features of twice the width.
        self.rotates_embeddings = config.position == "rope" and config.embedding_position == "before"
        self.qkv = builders.shared(config.hidden_size, 3 * self.head_dim, config.bias)
        for name in HEAD_EMBEDDINGS:
            self.register_parameter(name, nn.Parameter(torch.zeros(config.num_heads, self.head_dim)))
        self.out = builders.row(config.num_heads * self.head_dim, config.hidden_size, config.bias)

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """(S, B, H) → (S, B, H). The cache holds one K and one V head of width head_dim, whatever the position mode."""
        q_BKSD, k_BKSD, v_BKSD = split_heads(self.qkv(x_SBH), 3 * self.head_dim).chunk(3, dim=-1)
        q_BNSD = self.queries(q_BKSD, positions)
        k_BKSD = self.cached_keys(k_BKSD, positions)
        if cache is not None:
            k_BKSD, v_BKSD = cache.append(k_BKSD, v_BKSD, positions.offset)
        k_BKSD = self.key_features(k_BKSD, positions)
        context_BNSD = attend(q_BNSD, k_BKSD, v_BKSD, scale=self.head_dim**-0.5, bias=positions.bias)
        out_SBH: Tensor = self.out(merge_heads(self.add_values(context_BNSD)))
        return out_SBH

    def embedding(self, name: str) -> Tensor:
        """One of HEAD_EMBEDDINGS as (N, 1, D), to broadcast over (B, N, S, D)."""
        return self.get_parameter(name)[:, None, :]

    def queries(self, q_BKSD: Tensor, positions: Positions) -> Tensor:
        """The shared query as each head's, with all that its keys would have had: (B, 1, S, D) → (B, N, S, D or 2D)."""
        raise NotImplementedError

    def cached_keys(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        """The shared key of this pass's tokens as the cache keeps it, (B, 1, S, D)."""
        raise NotImplementedError

    def key_features(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        """What the queries meet: all T cached keys, (B, 1, T, D) → (B, 1, T, D or 2D)."""
        raise NotImplementedError

    def add_values(self, context_BNSD: Tensor) -> Tensor:
        """A_i v → A_i V_i, (B, N, S, D)."""
        raise NotImplementedError


class MHEAdd(MHEAttention):
    """MHE-ADD: embeddings are added."""

    def queries(self, q_BKSD: Tensor, positions: Positions) -> Tensor:
        e_query, e_key = self.embedding("query_embedding"), self.embedding("key_embedding")
        if not self.rotates_embeddings:
            # Q_i·e^K_i is the same for every key and cancels in softmax. 0·e^K gives the idle parameter its true gradient zero
            # instead of none: distributed engines wait for one from every parameter.
            return rotate(q_BKSD, positions) + (e_query + 0 * e_key)
        # Q_i·R_j e^K_i = Σ over channel pairs (a, b) of cos_j (Q_a e_a + Q_b e_b) + sin_j (Q_b e_a − Q_a e_b)
        q_BNSD = rotate(q_BKSD + e_query, positions)
        (first, second), (e_first, e_second) = q_BNSD.chunk(2, dim=-1), e_key.chunk(2, dim=-1)
        on_cos, on_sin = first * e_first + second * e_second, second * e_first - first * e_second
        return torch.cat([q_BNSD, on_cos, on_sin], dim=-1)

    def cached_keys(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        return rotate(k_BKSD, positions)

    def key_features(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        if not self.rotates_embeddings or positions.rotary is None:
            return k_BKSD
        tables = torch.cat(positions.rotary, dim=-1).to(k_BKSD.dtype)
        return torch.cat([k_BKSD, tables.expand_as(k_BKSD)], dim=-1)

    def add_values(self, context_BNSD: Tensor) -> Tensor:
        return context_BNSD + self.embedding("value_embedding")


class MHEMul(MHEAttention):
    """MHE-MUL: embeddings scale channels."""

    def queries(self, q_BKSD: Tensor, positions: Positions) -> Tensor:
        e_query, e_key = self.embedding("query_embedding"), self.embedding("key_embedding")
        if not self.rotates_embeddings:
            wide = torch.promote_types(e_query.dtype, torch.float32)
            e_query, e_key = e_query.to(wide), e_key.to(wide)
            return scale_by_one_plus(rotate(q_BKSD, positions), e_query + e_key + e_query * e_key)
        # Q_i·R_j(k ⊙ c) = Σ_c c_c k_c (cos_j Q_c + sin_j (rotᵀ Q)_c), rotᵀ taking the pair (a, b) to (b, −a)
        q_BNSD = rotate(scale_by_one_plus(q_BKSD, e_query), positions)
        first, second = q_BNSD.chunk(2, dim=-1)
        turned_BNSD = torch.cat([second, -first], dim=-1)
        return torch.cat([scale_by_one_plus(q_BNSD, e_key), scale_by_one_plus(turned_BNSD, e_key)], dim=-1)

    def cached_keys(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        return k_BKSD if self.rotates_embeddings else rotate(k_BKSD, positions)

    def key_features(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        if not self.rotates_embeddings or positions.rotary is None:
            return k_BKSD
        cos, sin = (table.repeat(1, 2) for table in positions.rotary)
        return torch.cat([k_BKSD * cos, k_BKSD * sin], dim=-1).to(k_BKSD.dtype)

    def add_values(self, context_BNSD: Tensor) -> Tensor:
        return scale_by_one_plus(context_BNSD, self.embedding("value_embedding"))


def scale_by_one_plus(x_BNSD: Tensor, e: Tensor) -> Tensor:
    """x ⊙ (1 + e) in the type of x, rounded once.

    1 + e itself would lose e in bf16: numbers near 1 are 2^-7 apart there, as much as a third of a typical embedding. e alone
    keeps its digits, and addcmul adds x ⊙ e to x in float32 without a float32 copy of x for each head.
    """
    return torch.addcmul(x_BNSD, x_BNSD, e.to(x_BNSD.dtype))
