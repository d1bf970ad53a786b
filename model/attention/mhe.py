"""Multiple Head Embeddings (MHE, arXiv 2310.07911): one shared projection each of Q, K and V; heads differ by three embeddings.

    ADD   Q_i = q + e^Q_i         K_i = k + e^K_i         V_i = v + e^V_i
    MUL   Q_i = q ⊙ (1 + e^Q_i)   K_i = k ⊙ (1 + e^K_i)   V_i = v ⊙ (1 + e^V_i)

Neither K_i nor V_i is ever made. Every variant is written as exact multi-query attention: what belongs to a head moves from its
keys to its queries and from its values to its output (rows of softmax sum to 1). The heads of ADD share their scores, too,
unless embeddings are rotated. docs/attention.md derives each step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.kernels import attend, choose, merge_heads, split_heads
from model.attention.shared_scores.operator import shared_scores
from model.gha.constraint import HeadConstraint
from model.gha.gram import added_value_gram, multiplied_value_gram
from model.layers import Layers
from model.positions.positions import Positions, rotate

HEAD_EMBEDDINGS = ("query_embedding", "key_embedding", "value_embedding")


@dataclass(frozen=True)
class HeadEmbeddings:
    """e^Q, e^K and e^V of this rank's heads, (N, D) each; `key` None where the model has none."""

    query: Tensor
    value: Tensor
    key: Tensor | None = None


class MHEAttention(nn.Module):
    """What ADD and MUL share: parameters and the way through multi-query attention."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.head_dim = config.head_width
        self.kernel = config.attention_kernel
        self.has_key_embedding = config.key_embedding
        # The embeddings enter before the rotation. If that of K does, keys need features of twice the width.
        self.rotates_queries = config.position == "rope" and config.embedding_position == "before"
        self.rotates_keys = self.rotates_queries and self.has_key_embedding
        self.qkv = layers.shared(config.hidden_size, 3 * self.head_dim, config.bias)
        for name in HEAD_EMBEDDINGS:
            if name != "key_embedding" or self.has_key_embedding:
                self.register_parameter(name, nn.Parameter(torch.zeros(config.num_heads, self.head_dim)))
        self.own_heads = layers.own_heads
        self.out = layers.row(config.num_heads * self.head_dim, config.hidden_size, config.bias)
        self.constraint: HeadConstraint | None = None

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """(S, B, H) → (S, B, H). The cache holds one K and one V head of width head_dim, whatever the position mode."""
        q_BKSD, k_BKTD, v_BKTD = split_heads(self.qkv(x_SBH), 3 * self.head_dim).chunk(3, dim=-1)
        k_BKTD = self.cached_keys(k_BKTD, positions)
        if cache is not None:
            k_BKTD, v_BKTD = cache.append(k_BKTD, v_BKTD, positions.offset)
        e = self.embeddings()
        heads_SBF = self.heads(q_BKSD, k_BKTD, v_BKTD, e, positions)
        if self.constraint is not None and cache is None:
            heads_SBF = self.constraint(
                heads_SBF,
                functools.partial(self.value_gram, v_BKTD, self.get_parameter("value_embedding"), self.constraint.layers),
                lambda rows_R: self.queries(q_BKSD[:, :, rows_R], e, positions.of_rows(rows_R)),
                self.key_features(k_BKTD, positions),
                positions,
            )
        out_SBH: Tensor = self.out(heads_SBF)
        return out_SBH

    def embeddings(self) -> HeadEmbeddings:
        """Those of this rank's heads; asked for once in a pass, since ranks gather their gradients."""
        names = [name for name in HEAD_EMBEDDINGS if name != "key_embedding" or self.has_key_embedding]
        own = self.own_heads(*(self.get_parameter(name) for name in names))
        return HeadEmbeddings(**{name.removesuffix("_embedding"): e_ND for name, e_ND in zip(names, own, strict=True)})

    def heads(self, q_BKSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, e: HeadEmbeddings, positions: Positions) -> Tensor:
        """This rank's heads side by side, (S, B, N·D)."""
        return self.multi_query_heads(q_BKSD, k_BKTD, v_BKTD, e, positions, self.kernel)

    def multi_query_heads(
        self, q_BKSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, e: HeadEmbeddings, positions: Positions, kernel: str
    ) -> Tensor:
        """This rank's heads side by side, (S, B, N·D), as multi-query attention."""
        context_BNSD = attend(
            self.queries(q_BKSD, e, positions),
            self.key_features(k_BKTD, positions),
            v_BKTD,
            positions,
            scale=self.head_dim**-0.5,
            kernel=kernel,
        )
        return merge_heads(self.add_values(context_BNSD, e.value[:, None]))

    def queries(self, q_BKSD: Tensor, e: HeadEmbeddings, positions: Positions) -> Tensor:
        """The shared query as each head's, with all that its keys would have had: (B, 1, S, D) → (B, N, S, D or 2D)."""
        raise NotImplementedError

    def cached_keys(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        """The shared key of this pass's tokens as the cache keeps it, (B, 1, S, D)."""
        raise NotImplementedError

    def key_features(self, k_BKTD: Tensor, positions: Positions) -> Tensor:
        """What the queries meet: all T cached keys, (B, 1, T, D) → (B, 1, T, D or 2D)."""
        raise NotImplementedError

    def add_values(self, context_BNSD: Tensor, e_value_N1D: Tensor) -> Tensor:
        """A_i v → A_i V_i, (B, N, S, D)."""
        raise NotImplementedError

    def value_gram(self, v_BKTD: Tensor, e_value_ND: Tensor, layers: Layers) -> Tensor:
        """V_i·V_j over all tokens and all heads, (N, N); the embeddings are those of all ranks."""
        raise NotImplementedError


class MHEAdd(MHEAttention):
    """MHE-ADD: embeddings are added."""

    def heads(self, q_BKSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, e: HeadEmbeddings, positions: Positions) -> Tensor:
        choice = choose(
            self.kernel,
            shares_scores=not self.rotates_queries,
            device=q_BKSD.device,
            dtype=q_BKSD.dtype,
            heads=e.value.shape[0],
            head_dim=self.head_dim,
            queries=q_BKSD.shape[2],
            keys=k_BKTD.shape[2],
        )
        if choice.kernel != "shared_scores":
            return self.multi_query_heads(q_BKSD, k_BKTD, v_BKTD, e, positions, choice.kernel)
        heads_SBND = shared_scores(
            rotate(q_BKSD, positions)[:, 0],
            k_BKTD[:, 0],
            v_BKTD[:, 0],
            self.query_bias(e),
            e.value,
            scale=self.head_dim**-0.5,
            slopes_N=positions.slopes_N,
            mask=positions.mask,
        )
        return heads_SBND.flatten(2)

    def query_bias(self, e: HeadEmbeddings) -> Tensor:
        """e^Q, (N, D), where e^K is idle.

        Q_i·e^K_i is then the same for every key and cancels in softmax. 0·e^K gives the idle parameter its true gradient zero
        instead of none: distributed engines wait for one from every parameter.
        """
        return e.query if e.key is None else e.query + 0 * e.key

    def queries(self, q_BKSD: Tensor, e: HeadEmbeddings, positions: Positions) -> Tensor:
        if not self.rotates_queries:
            return rotate(q_BKSD, positions) + self.query_bias(e)[:, None]
        q_BNSD = rotate(q_BKSD + e.query[:, None], positions)
        if e.key is None:
            return q_BNSD
        # Q_i·R_j e^K_i = Σ over channel pairs (a, b) of cos_j (Q_a e_a + Q_b e_b) + sin_j (Q_b e_a − Q_a e_b)
        (first, second), (e_first, e_second) = q_BNSD.chunk(2, dim=-1), e.key[:, None].chunk(2, dim=-1)
        on_cos, on_sin = first * e_first + second * e_second, second * e_first - first * e_second
        return torch.cat([q_BNSD, on_cos, on_sin], dim=-1)

    def cached_keys(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        return rotate(k_BKSD, positions)

    def key_features(self, k_BKTD: Tensor, positions: Positions) -> Tensor:
        if not self.rotates_keys or positions.rotary is None:
            return k_BKTD
        tables = torch.cat(positions.rotary, dim=-1).to(k_BKTD.dtype)
        return torch.cat([k_BKTD, tables.expand_as(k_BKTD)], dim=-1)

    def add_values(self, context_BNSD: Tensor, e_value_N1D: Tensor) -> Tensor:
        return context_BNSD + e_value_N1D

    def value_gram(self, v_BKTD: Tensor, e_value_ND: Tensor, layers: Layers) -> Tensor:
        return added_value_gram(v_BKTD, e_value_ND, layers)


class MHEMul(MHEAttention):
    """MHE-MUL: embeddings scale channels."""

    def queries(self, q_BKSD: Tensor, e: HeadEmbeddings, positions: Positions) -> Tensor:
        e_query = e.query[:, None]
        if e.key is None:
            q_BNSD = q_BKSD if self.rotates_queries else rotate(q_BKSD, positions)
            q_BNSD = scale_by_one_plus(q_BNSD, e_query)
            return rotate(q_BNSD, positions) if self.rotates_queries else q_BNSD
        e_key = e.key[:, None]
        if not self.rotates_queries:
            wide = torch.promote_types(e_query.dtype, torch.float32)
            e_query, e_key = e_query.to(wide), e_key.to(wide)
            return scale_by_one_plus(rotate(q_BKSD, positions), e_query + e_key + e_query * e_key)
        # Q_i·R_j(k ⊙ c) = Σ_c c_c k_c (cos_j Q_c + sin_j (rotᵀ Q)_c), rotᵀ taking the pair (a, b) to (b, −a)
        q_BNSD = rotate(scale_by_one_plus(q_BKSD, e_query), positions)
        first, second = q_BNSD.chunk(2, dim=-1)
        turned_BNSD = torch.cat([second, -first], dim=-1)
        return torch.cat([scale_by_one_plus(q_BNSD, e_key), scale_by_one_plus(turned_BNSD, e_key)], dim=-1)

    def cached_keys(self, k_BKSD: Tensor, positions: Positions) -> Tensor:
        return k_BKSD if self.rotates_keys else rotate(k_BKSD, positions)

    def key_features(self, k_BKTD: Tensor, positions: Positions) -> Tensor:
        if not self.rotates_keys or positions.rotary is None:
            return k_BKTD
        cos, sin = (table.repeat(1, 2) for table in positions.rotary)
        return torch.cat([k_BKTD * cos, k_BKTD * sin], dim=-1).to(k_BKTD.dtype)

    def add_values(self, context_BNSD: Tensor, e_value_N1D: Tensor) -> Tensor:
        return scale_by_one_plus(context_BNSD, e_value_N1D)

    def value_gram(self, v_BKTD: Tensor, e_value_ND: Tensor, layers: Layers) -> Tensor:
        return multiplied_value_gram(v_BKTD, e_value_ND, layers)


def scale_by_one_plus(x_BNSD: Tensor, e: Tensor) -> Tensor:
    """x ⊙ (1 + e) in the type of x, rounded once.

    1 + e itself would lose e in bf16: numbers near 1 are 2^-7 apart there, as much as a third of a typical embedding. e alone
    keeps its digits, and addcmul adds x ⊙ e to x in float32 without a float32 copy of x for each head.
    """
    return torch.addcmul(x_BNSD, x_BNSD, e.to(x_BNSD.dtype))
