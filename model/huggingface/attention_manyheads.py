"""Kinds of attention of the manyheads decoder for transformers. Exported folders hold a copy of this file.

Multiple Head Embeddings (arXiv 2310.07911) run as exact multi-query attention, so the cache keeps one head of keys and values:

    ADD   Q_i = q + e^Q_i         K_i = k + e^K_i         V_i = v + e^V_i
    MUL   Q_i = q ⊙ (1 + e^Q_i)   K_i = k ⊙ (1 + e^K_i)   V_i = v ⊙ (1 + e^V_i)

K_i and V_i are never materialized: a head's embeddings move from its keys to its queries and from its values to its output.

Letters of shapes: B sequences, S tokens of this pass, T cached and new tokens, N query heads, K key/value heads, D the width of
a head, H the hidden width, E and F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from .configuration_manyheads import ManyheadsConfig

Rotary = dict[int, tuple[Tensor, Tensor]]  # cos and sin for each width of what is rotated
HEAD_EMBEDDINGS = ("query_embedding", "key_embedding", "value_embedding")


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The formula, with softmax in float32 or wider: heads (B, S, N, D) and weights (B, N, S, T).

    `softcap`: c of c · tanh(score / c). `sinks` (N, 1): a logit of each head in the denominator.
    """
    groups, wide = query.shape[1] // key.shape[1], torch.promote_types(query.dtype, torch.float32)
    if softcap is not None or sinks is not None:  # in training their scores are never rounded
        query, key = query.to(wide), key.to(wide)
    scores_BNST = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        scores_BNST = softcap * torch.tanh(scores_BNST / softcap)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores_BNST = scores_BNST.masked_fill(~attention_mask, torch.finfo(scores_BNST.dtype).min)
    elif attention_mask is not None:
        scores_BNST = scores_BNST + attention_mask
    if sinks is not None:
        scores_BNST = torch.cat([scores_BNST, sinks[:, None].to(query.dtype).expand(*scores_BNST.shape[:3], 1)], dim=-1)
    weights_BNST = scores_BNST.softmax(dim=-1, dtype=wide).to(value.dtype)[..., : key.shape[2]]
    weights_BNST = F.dropout(weights_BNST, dropout, module.training)
    heads_BNSD = weights_BNST @ value.repeat_interleave(groups, dim=1)
    return heads_BNSD.transpose(1, 2).contiguous(), weights_BNST


def split_heads(x_BSF: Tensor, width: int) -> Tensor:
    """(B, S, N·width) → (B, N, S, width)."""
    return x_BSF.unflatten(-1, (-1, width)).transpose(1, 2)


def rotate(x_BNSD: Tensor, rotary: Rotary | None) -> Tensor:
    """Apply RoPE; channel c is paired with c + D/2, as in Llama. No-op without rope."""
    if rotary is None:
        return x_BNSD
    cos, sin = rotary[x_BNSD.shape[-1]]
    first, second = x_BNSD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BNSD.dtype)


def scale_by_one_plus(x_BNSD: Tensor, e: Tensor) -> Tensor:
    """x ⊙ (1 + e) in the type of x, rounded once: in bf16 1 + e would lose most of a small e."""
    return torch.addcmul(x_BNSD, x_BNSD, e.to(x_BNSD.dtype))


class ManyheadsAttention(nn.Module):
    """What all attention shares: the cache, the attention implementation and the output projection.

    Subclasses compute queries, and keys and values as the cache stores them: already rotated, so that a cached token's position
    is not needed later. Values are D wide.
    """

    is_causal = True

    def __init__(self, config: ManyheadsConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.kept_heads = config.cached_heads(config.kind(layer_idx))
        self.num_key_value_groups = self.num_heads // self.kept_heads
        self.scaling = self.head_dim**-0.5
        self.query_norm, self.key_norm = (
            nn.RMSNorm(self.head_dim, config.norm_epsilon) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.add_projections(config)
        self.sink = nn.Parameter(torch.zeros(self.num_heads, 1)) if config.attention_sinks else None
        self.output_gate: nn.Linear | None = None
        if config.output_gate is not None:
            gates = self.num_heads * (self.head_dim if config.output_gate == "elementwise" else 1)
            self.output_gate = nn.Linear(config.hidden_size, gates, config.bias)
        self.out = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, config.bias)

    def add_projections(self, config: ManyheadsConfig) -> None:
        """Make the parameters of queries, keys and values."""
        raise NotImplementedError

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, S, D or 2D), keys (B, K, S, as wide) and values (B, K, S, D)."""
        raise NotImplementedError

    def finish(self, heads_BSND: Tensor) -> Tensor:
        """Postprocess the heads before the output projection, (B, S, N, D)."""
        return heads_BSND

    def sinks(self) -> Tensor | None:
        """The logit of each query head in the denominator of its softmax, (N, 1)."""
        return self.sink

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Averages of the values, (B, S, N, as wide as values), and the weights; keys and values as the cache stores them."""
        if self.config.capped_or_sunk:  # which implementations of transformers do not compute
            return eager_attention_forward(
                self, query, key, value, attention_mask, self.scaling, softcap=self.config.logit_softcap, sinks=self.sinks()
            )
        width = value.shape[-1]
        interface: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if is_flash_attention_requested(self.config):  # its kernels need queries, keys and values of equal width
            value = F.pad(value, (0, key.shape[-1] - width))
        heads, weights = interface(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return heads[..., :width], weights

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, H) → (B, S, H), and the weights (B, N, S, T) where the implementation gives them."""
        heads_BSND, weights = self.attended(hidden_states, rotary, attention_mask, past_key_values, **kwargs)
        if self.output_gate is not None:
            gates_BSN = self.output_gate(hidden_states).sigmoid()
            heads_BSND = heads_BSND * gates_BSN.unflatten(-1, (self.num_heads, -1))
        return self.out(heads_BSND.flatten(2)), weights

    def attended(
        self,
        hidden_states: Tensor,
        rotary: Rotary | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs of heads, (B, S, N, D), and the weights."""
        query, key, value = self.project(hidden_states, rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        heads_BSND, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.finish(heads_BSND), weights


class ManyheadsGroupedQueryAttention(ManyheadsAttention):
    """mha, gqa and mqa: N query heads on K heads of keys and values."""

    def add_projections(self, config: ManyheadsConfig) -> None:
        width, kept = self.head_dim, self.kept_heads
        self.query = nn.Linear(config.hidden_size, self.num_heads * width, config.bias)
        self.key_value = nn.Linear(config.hidden_size, kept * 2 * width, config.bias)  # head by head, [k_1 v_1 k_2 v_2 …]

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q_BNSD = split_heads(self.query(x_BSH), self.head_dim)
        k_BKSD, v_BKSD = split_heads(self.key_value(x_BSH), 2 * self.head_dim).chunk(2, dim=-1)
        return rotate(self.query_norm(q_BNSD), rotary), rotate(self.key_norm(k_BKSD), rotary), v_BKSD


class ManyheadsSharedKeyValueAttention(ManyheadsAttention):
    """skv and el: the keys of a head are its values, in el the hidden state itself; with rope only keys are rotated.

    The cache stores keys and values of all heads, although they are equal without rope.
    """

    def add_projections(self, config: ManyheadsConfig) -> None:
        width = self.num_heads * self.head_dim
        self.query = nn.Linear(config.hidden_size, width, config.bias)
        unprojected = config.kind(self.layer_idx) == "el"
        self.key_value = nn.Identity() if unprojected else nn.Linear(config.hidden_size, width, config.bias)

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q_BNSD, v_BNSD = (split_heads(linear(x_BSH), self.head_dim) for linear in (self.query, self.key_value))
        return rotate(self.query_norm(q_BNSD), rotary), rotate(self.key_norm(v_BNSD), rotary), v_BNSD


class ManyheadsSingleHeadAttention(ManyheadsAttention):
    """sha: G heads, each of which the output projection reads N/G times. Only slopes and sinks distinguish these N/G."""

    def add_projections(self, config: ManyheadsConfig) -> None:
        self.seeds = self.kept_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * self.seeds * self.head_dim, config.bias)
        self.num_key_value_groups = self.num_heads // self.seeds if self.distinguishes(config) else 1

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q_BGSD, k_BGSD, v_BGSD = split_heads(self.qkv(x_BSH), 3 * self.head_dim).chunk(3, dim=-1)
        q_BNSD = rotate(self.query_norm(q_BGSD), rotary).repeat_interleave(self.num_key_value_groups, dim=1)
        return q_BNSD, rotate(self.key_norm(k_BGSD), rotary), v_BGSD

    def distinguishes(self, config: ManyheadsConfig) -> bool:
        """Whether slopes or sinks distinguish the heads of a seed."""
        return config.attention_sinks or config.layer_position(self.layer_idx) == "alibi"

    def finish(self, heads_BSND: Tensor) -> Tensor:
        return heads_BSND.repeat_interleave(self.num_heads // heads_BSND.shape[2], dim=2)


class ManyheadsEmbeddedAttention(ManyheadsAttention):
    """mhe_add and mhe_mul: G shared heads of each projection, each for N/G neighbours, and embeddings (N, D) of the heads.

    The cache stores G heads. Their keys are D wide, but 2D if e^K is applied before a rotation: each head then needs its own
    rotated key, which it computes from the token's key and angles.
    """

    embeds = True  # whether heads have embeddings
    query_embedding: nn.Parameter
    key_embedding: nn.Parameter | None
    value_embedding: nn.Parameter

    def add_projections(self, config: ManyheadsConfig) -> None:
        self.qkv = nn.Linear(config.hidden_size, 3 * self.kept_heads * self.head_dim, config.bias)
        for name in HEAD_EMBEDDINGS:
            kept = name != "key_embedding" or config.key_embedding
            self.register_parameter(name, nn.Parameter(torch.zeros(self.num_heads, self.head_dim)) if kept else None)
        self.rotates = config.rotates_embeddings and config.layer_position(self.layer_idx) == "rope"

    def project(self, x_BSH: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q_BGSD, k_BGSD, v_BGSD = split_heads(self.qkv(x_BSH), 3 * self.head_dim).chunk(3, dim=-1)
        q_BGSD, k_BGSD = self.query_norm(q_BGSD), self.key_norm(k_BGSD)
        e_query_N1D = self.query_embedding[:, None]
        e_key_N1D = None if self.key_embedding is None else self.key_embedding[:, None]
        one = q_BGSD.shape[1] == 1  # then sums and products expand it, after the rotation if they can
        q_BNSD = q_BGSD if one else q_BGSD.repeat_interleave(self.num_key_value_groups, dim=1)
        return self.queries(q_BNSD, e_query_N1D, e_key_N1D, rotary), self.keys(k_BGSD, rotary), v_BGSD

    def queries(self, q_BNSD: Tensor, e_query_N1D: Tensor, e_key_N1D: Tensor | None, rotary: Rotary | None) -> Tensor:
        """The shared query of each head, or of all, with what belongs to the head and to its keys: (B, N, S, D or 2D)."""
        raise NotImplementedError

    def keys(self, k_BGSD: Tensor, rotary: Rotary | None) -> Tensor:
        """The keys for these queries, (B, G, S, D or 2D)."""
        raise NotImplementedError


class ManyheadsAddAttention(ManyheadsEmbeddedAttention):
    """mhe_add: embeddings are added.

    With a sink or a soft-cap Q_i·e^K_i does not cancel, so it is a channel of queries that is 1 in all keys. With a sink e^V_i
    is multiplied by the sum of the weights of keys, that of a channel which is 1 in all values.
    """

    @property
    def shifts_scores(self) -> bool:
        return self.config.capped_or_sunk and not self.rotates and self.key_embedding is not None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.sink is None or not self.embeds:
            return super().attend(query, key, value, attention_mask, **kwargs)
        heads, weights = super().attend(query, key, F.pad(value, (0, 1), value=1.0), attention_mask, **kwargs)
        return heads[..., :-1] + (heads[..., -1:] - 1) * self.value_embedding, weights  # `finish` adds it once

    def queries(self, q_BNSD: Tensor, e_query_N1D: Tensor, e_key_N1D: Tensor | None, rotary: Rotary | None) -> Tensor:
        if self.shifts_scores and e_key_N1D is not None:
            q_BNSD = rotate(q_BNSD, rotary) + e_query_N1D
            return torch.cat([q_BNSD, (q_BNSD * e_key_N1D).sum(-1, keepdim=True)], dim=-1)
        if not self.rotates:
            # Q_i·e^K_i is the same for all keys and cancels in softmax. 0·e^K gives the idle parameter a gradient of zero:
            # distributed engines wait for a gradient of every parameter.
            return rotate(q_BNSD, rotary) + (e_query_N1D if e_key_N1D is None else e_query_N1D + 0 * e_key_N1D)
        q_BNSD = rotate(q_BNSD + e_query_N1D, rotary)
        if e_key_N1D is None:
            return q_BNSD
        # Q_i·R_j e^K_i = Σ over channel pairs (a, b) of cos_j (Q_a e_a + Q_b e_b) + sin_j (Q_b e_a − Q_a e_b)
        (first, second), (e_first, e_second) = q_BNSD.chunk(2, dim=-1), e_key_N1D.chunk(2, dim=-1)
        on_cos, on_sin = first * e_first + second * e_second, second * e_first - first * e_second
        return torch.cat([q_BNSD, on_cos, on_sin], dim=-1)

    def keys(self, k_BGSD: Tensor, rotary: Rotary | None) -> Tensor:
        k_BGSD = rotate(k_BGSD, rotary)
        if self.shifts_scores:
            return F.pad(k_BGSD, (0, 1), value=1.0)
        if not self.rotates or self.key_embedding is None or rotary is None:
            return k_BGSD
        return torch.cat([k_BGSD, torch.cat(rotary[self.head_dim], dim=-1).to(k_BGSD.dtype).expand_as(k_BGSD)], dim=-1)

    def finish(self, heads_BSND: Tensor) -> Tensor:
        return heads_BSND + self.value_embedding


class ManyheadsMulAttention(ManyheadsEmbeddedAttention):
    """mhe_mul: embeddings scale channels."""

    def queries(self, q_BNSD: Tensor, e_query_N1D: Tensor, e_key_N1D: Tensor | None, rotary: Rotary | None) -> Tensor:
        if not self.rotates:
            if e_key_N1D is not None:
                wide = torch.promote_types(e_query_N1D.dtype, torch.float32)
                e_query_N1D, e_key_N1D = e_query_N1D.to(wide), e_key_N1D.to(wide)
                e_query_N1D = e_query_N1D + e_key_N1D + e_query_N1D * e_key_N1D
            return scale_by_one_plus(rotate(q_BNSD, rotary), e_query_N1D)
        q_BNSD = rotate(scale_by_one_plus(q_BNSD, e_query_N1D), rotary)
        if e_key_N1D is None:
            return q_BNSD
        # Q_i·R_j(k ⊙ c) = Σ_c c_c k_c (cos_j Q_c + sin_j (rotᵀ Q)_c), rotᵀ taking the pair (a, b) to (b, −a)
        first, second = q_BNSD.chunk(2, dim=-1)
        turned_BNSD = torch.cat([second, -first], dim=-1)
        return torch.cat([scale_by_one_plus(q_BNSD, e_key_N1D), scale_by_one_plus(turned_BNSD, e_key_N1D)], dim=-1)

    def keys(self, k_BGSD: Tensor, rotary: Rotary | None) -> Tensor:
        if not self.rotates or self.key_embedding is None or rotary is None:
            return rotate(k_BGSD, rotary)
        cos, sin = (table.repeat(1, 1, 1, 2) for table in rotary[self.head_dim])
        return torch.cat([k_BGSD * cos, k_BGSD * sin], dim=-1).to(k_BGSD.dtype)

    def finish(self, heads_BSND: Tensor) -> Tensor:
        return scale_by_one_plus(heads_BSND, self.value_embedding)


ATTENTION: dict[str, type[ManyheadsAttention]] = {
    "mha": ManyheadsGroupedQueryAttention,
    "gqa": ManyheadsGroupedQueryAttention,
    "mqa": ManyheadsGroupedQueryAttention,
    "skv": ManyheadsSharedKeyValueAttention,
    "el": ManyheadsSharedKeyValueAttention,
    "sha": ManyheadsSingleHeadAttention,
    "mhe_add": ManyheadsAddAttention,
    "mhe_mul": ManyheadsMulAttention,
}
