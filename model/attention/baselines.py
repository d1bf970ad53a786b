"""The variants that MHE is compared with: MHA, GQA, MQA, SKV, EL-attention, SHA (arXiv 2310.07911)."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.kernels import attend, merge_heads, split_heads
from model.attention.registry import attention_variant
from model.gha.constraint import HeadConstraint
from model.gha.gram import value_gram
from model.layers import Layers
from model.positions.positions import Positions, rotate


class GroupedQueryAttention(nn.Module):
    """N query heads on K key/value heads; N/K neighbours share one (Ainslie et al., arXiv 2305.13245).

    K = N is MHA (Vaswani et al. 2017), K = 1 is MQA (Shazeer, arXiv 1911.02150).
    """

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.head_dim, self.kernel = config.head_width, config.attention_kernel
        kv_heads = attention_variant(config.attention).kv_heads(config)
        width = config.num_heads * self.head_dim
        self.query = layers.column(config.hidden_size, width, config.bias)
        # Outputs go head by head, [k_1 v_1 k_2 v_2 …], so that a shard of columns holds whole heads.
        self.key_value = layers.key_value(config.hidden_size, kv_heads, 2 * self.head_dim, config.bias)
        self.out = layers.row(width, config.hidden_size, config.bias)
        self.project = layers.project
        self.constraint: HeadConstraint | None = None

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """(S, B, H) → (S, B, H)."""
        query_SBD, key_value_SBD = self.project(x_SBH, self.query, self.key_value)
        q_BNSD = rotate(split_heads(query_SBD, self.head_dim), positions)
        k_BKTD, v_BKTD = split_heads(key_value_SBD, 2 * self.head_dim).chunk(2, dim=-1)
        k_BKTD = rotate(k_BKTD, positions)
        if cache is not None:
            k_BKTD, v_BKTD = cache.append(k_BKTD, v_BKTD, positions.offset)
        heads_SBF = merge_heads(attend(q_BNSD, k_BKTD, v_BKTD, positions, scale=self.head_dim**-0.5, kernel=self.kernel))
        if self.constraint is not None and cache is None:
            own_values = functools.partial(value_gram, v_BKTD, self.constraint.layers)
            heads_SBF = self.constraint(heads_SBF, own_values, lambda rows_R: q_BNSD[:, :, rows_R], k_BKTD, positions)
        out_SBH: Tensor = self.out(heads_SBF)
        return out_SBH


class SharedKeyValueAttention(nn.Module):
    """SKV: the keys of a head are its values; with rope they are rotated as keys only."""

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.head_dim, self.kernel = config.head_width, config.attention_kernel
        width = config.num_heads * self.head_dim
        self.query = layers.column(config.hidden_size, width, config.bias)
        self.key_value = self.build_key_value(config, layers)
        self.out = layers.row(width, config.hidden_size, config.bias)
        self.project = layers.project
        self.constraint: HeadConstraint | None = None

    def build_key_value(self, config: ModelConfig, layers: Layers) -> nn.Module:
        """Makes the module that maps (S, B, H) to the values of this rank's heads, (S, B, N·D)."""
        return layers.column(config.hidden_size, config.num_heads * self.head_dim, config.bias)

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """(S, B, H) → (S, B, H). The cache holds the values alone; keys are made from them at each step."""
        query_SBD, value_SBD = self.project(x_SBH, self.query, self.key_value)
        q_BNSD = rotate(split_heads(query_SBD, self.head_dim), positions)
        v_BNTD = split_heads(value_SBD, self.head_dim)
        if cache is not None:
            v_BNTD = append_once(cache, v_BNTD, positions.offset)
        k_BNTD = rotate(v_BNTD, replace(positions, length=v_BNTD.shape[2], offset=0))
        heads_SBF = merge_heads(attend(q_BNSD, k_BNTD, v_BNTD, positions, scale=self.head_dim**-0.5, kernel=self.kernel))
        if self.constraint is not None and cache is None:
            own_values = functools.partial(value_gram, v_BNTD, self.constraint.layers)
            heads_SBF = self.constraint(heads_SBF, own_values, lambda rows_R: q_BNSD[:, :, rows_R], k_BNTD, positions)
        out_SBH: Tensor = self.out(heads_SBF)
        return out_SBH


class ELAttention(SharedKeyValueAttention):
    """EL-attention as MHE was compared with it: K and V are the hidden state itself, split into heads.

    After Yan et al. (arXiv 2105.04779), whose heads all read the whole hidden state; num_heads · head_dim must be its width.
    """

    def build_key_value(self, config: ModelConfig, layers: Layers) -> nn.Module:
        return layers.own_channels()


class SingleHeadAttention(nn.Module):
    """SHA: MHE without embeddings. All heads are one, which the output projection reads N times.

    ALiBi alone tells heads apart, by their slopes; then the shared query meets the shared key N times.
    """

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        own = layers.own(config.num_heads)
        self.num_heads, self.head_dim, self.kernel = own.stop - own.start, config.head_width, config.attention_kernel
        self.qkv = layers.shared(config.hidden_size, 3 * self.head_dim, config.bias)
        self.out = layers.row(config.num_heads * self.head_dim, config.hidden_size, config.bias)

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """(S, B, H) → (S, B, H)."""
        q_BKSD, k_BKTD, v_BKTD = split_heads(self.qkv(x_SBH), 3 * self.head_dim).chunk(3, dim=-1)
        q_BKSD, k_BKTD = rotate(q_BKSD, positions), rotate(k_BKTD, positions)
        if cache is not None:
            k_BKTD, v_BKTD = cache.append(k_BKTD, v_BKTD, positions.offset)
        if positions.slopes_N is not None:
            q_BKSD = q_BKSD.expand(-1, self.num_heads, -1, -1)
        heads_BKSD = attend(q_BKSD, k_BKTD, v_BKTD, positions, scale=self.head_dim**-0.5, kernel=self.kernel)
        out_SBH: Tensor = self.out(merge_heads(heads_BKSD.expand(-1, self.num_heads, -1, -1)))
        return out_SBH


def append_once(cache: LayerCache, x_BNSD: Tensor, offset: int) -> Tensor:
    """Cache S tokens of a tensor that is both K and V; return all T tokens, (B, N, T, D).

    The first half of its heads goes where keys are kept, the second where values are. An odd N keeps its middle head twice.
    """
    heads = x_BNSD.shape[1]
    half = (heads + 1) // 2
    first_BKTD, second_BKTD = cache.append(x_BNSD[:, :half], x_BNSD[:, -half:], offset)
    return torch.cat([first_BKTD, second_BKTD[:, 2 * half - heads :]], dim=1)
