"""The attention variants with a query projection for each head: MHA, MQA, GQA."""

from __future__ import annotations

from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.kernels import attend, merge_heads, split_heads
from model.attention.registry import attention_variant
from model.layers import LinearBuilders
from model.positions import Positions, rotate


class GroupedQueryAttention(nn.Module):
    """N query heads on K key/value heads; N/K neighbours share one (Ainslie et al., arXiv 2305.13245).

    K = N is MHA (Vaswani et al. 2017), K = 1 is MQA (Shazeer, arXiv 1911.02150).
    """

    def __init__(self, config: ModelConfig, builders: LinearBuilders) -> None:
        super().__init__()
        self.head_dim = config.head_width
        kv_heads = attention_variant(config.attention).kv_heads(config)
        width = config.num_heads * self.head_dim
        self.query = builders.column(config.hidden_size, width, config.bias)
        # Outputs go head by head, [k_1 v_1 k_2 v_2 …], so that a shard of columns holds whole heads; one head cannot be split.
        key_value = builders.column if kv_heads > 1 else builders.shared
        self.key_value = key_value(config.hidden_size, 2 * kv_heads * self.head_dim, config.bias)
        self.out = builders.row(width, config.hidden_size, config.bias)

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """(S, B, H) → (S, B, H)."""
        q_BNSD = rotate(split_heads(self.query(x_SBH), self.head_dim), positions)
        k_BKSD, v_BKSD = split_heads(self.key_value(x_SBH), 2 * self.head_dim).chunk(2, dim=-1)
        k_BKSD = rotate(k_BKSD, positions)
        if cache is not None:
            k_BKSD, v_BKSD = cache.append(k_BKSD, v_BKSD, positions.offset)
        heads_BNSD = attend(q_BNSD, k_BKSD, v_BKSD, scale=self.head_dim**-0.5, bias=positions.bias)
        out_SBH: Tensor = self.out(merge_heads(heads_BNSD))
        return out_SBH
