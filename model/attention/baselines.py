"""The baselines of MHE: MHA, GQA, MQA, SKV, EL-attention, SHA (arXiv 2310.07911)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.base import Attention, Own, SharedProjection
from model.attention.cache import LayerCache
from model.attention.registry import attention_variant
from model.heads import repeat_heads, split_heads
from model.layers import Layers
from model.positions.positions import Positions
from model.positions.rotary import rotate


class GroupedQueryAttention(Attention):
    """N query heads on K key/value heads; N/K neighbours share one (Ainslie et al., arXiv 2305.13245).

    K = N is MHA (Vaswani et al. 2017), K = 1 is MQA (Shazeer, arXiv 1911.02150).
    """

    def build(self, config: ModelConfig, layers: Layers) -> None:
        kv_heads = attention_variant(config.attention).kv_heads(config)
        self.query = layers.column(config.hidden_size, config.num_heads * self.head_dim, config.bias)
        # Interleaved by head, so that a shard of columns holds complete heads.
        self.key_value = layers.key_value(config.hidden_size, kv_heads, 2 * self.head_dim, config.bias)


class SharedKeyValueAttention(Attention):
    """SKV: a head's values are also its keys; rope rotates only the copy used as keys."""

    def build(self, config: ModelConfig, layers: Layers) -> None:
        self.query = layers.column(config.hidden_size, config.num_heads * self.head_dim, config.bias)
        self.key_value = self.build_key_value(config, layers)

    def build_key_value(self, config: ModelConfig, layers: Layers) -> nn.Module:
        """Make the module that maps (S, B, H) to the values of this rank's heads, (S, B, N·D)."""
        return layers.column(config.hidden_size, config.num_heads * self.head_dim, config.bias)

    def split_keys_values(self, key_value_SBD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        v_BNSD = split_heads(key_value_SBD, self.head_dim)
        return rotate(v_BNSD, positions), v_BNSD

    def extend(self, cache: LayerCache, k_BKSD: Tensor, v_BKSD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """The cache holds only values; keys are recomputed from them at each step."""
        v_BKTD = cache.append_once(v_BKSD, positions.offset)
        return rotate(v_BKTD, replace(positions, length=v_BKTD.shape[2], offset=0)), v_BKTD


class ELAttention(SharedKeyValueAttention):
    """EL-attention as in the MHE paper: K and V are the hidden state itself, split into heads.

    In the original (Yan et al., arXiv 2105.04779) every head reads the full hidden state. num_heads · head_dim must equal its
    width.
    """

    def build_key_value(self, config: ModelConfig, layers: Layers) -> nn.Module:
        return layers.own_channels()


class SingleHeadAttention(SharedProjection):
    """SHA: MHE without embeddings. There is one head for each seed, which the output projection reads N / num_seeds times.

    Only ALiBi's slopes distinguish the heads of a seed: with them its query is repeated for each.
    """

    def query_features(self, q_BNSD: Tensor, own: Own, positions: Positions) -> Tensor:
        return q_BNSD if positions.slopes_N is None else repeat_heads(q_BNSD, self.num_heads)

    def head_outputs(self, context_BNSD: Tensor, own: Own) -> Tensor:
        return repeat_heads(context_BNSD, self.num_heads)
