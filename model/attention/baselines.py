"""The baselines of MHE: MHA, GQA, MQA, SKV, EL-attention, SHA (arXiv 2310.07911)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from model.attention.base import SINK, Attention, Own, Projected, SharedProjection
from model.attention.cache import LayerCache
from model.heads import repeat_heads, split_heads
from model.positions.positions import Positions
from model.positions.rotary import rotate


class GroupedQueryAttention(Attention):
    """N query heads on K key/value heads; N/K neighbours share one (Ainslie et al., arXiv 2305.13245).

    K = N is MHA (Vaswani et al. 2017), K = 1 is MQA (Shazeer, arXiv 1911.02150).
    """


class SharedKeyValueAttention(Attention):
    """SKV: a head's values are also its keys; norm and rope change only the copy used as keys."""

    def split_keys_values(self, projected: Projected, positions: Positions) -> tuple[Tensor, Tensor]:
        v_BNSD = split_heads(projected["key_value"], self.head_dim)
        return self.as_keys(v_BNSD, positions), v_BNSD

    def as_keys(self, v_BNSD: Tensor, positions: Positions) -> Tensor:
        return rotate(self.key_norm(v_BNSD), positions)

    def extend(self, cache: LayerCache, k_BKSD: Tensor, v_BKSD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """The cache holds only values; keys are recomputed from them at each step."""
        v_BKTD = cache.append_once(v_BKSD, positions.offset)
        return self.as_keys(v_BKTD, replace(positions, length=v_BKTD.shape[2], offset=0)), v_BKTD


class ELAttention(SharedKeyValueAttention):
    """EL-attention as in the MHE paper: K and V are the hidden state itself, split into heads.

    In the original (Yan et al., arXiv 2105.04779) every head reads the full hidden state. num_heads · head_dim must equal its
    width.
    """


class SingleHeadAttention(SharedProjection):
    """SHA: MHE without embeddings. There is one head for each seed, which the output projection reads N / num_seeds times.

    Only ALiBi's slopes and sinks distinguish the heads of a seed: with them its query is repeated for each.
    """

    def query_features(self, q_BNSD: Tensor, own: Own, positions: Positions) -> Tensor:
        alike = positions.slopes_N is None and SINK not in own
        return q_BNSD if alike else repeat_heads(q_BNSD, self.num_heads)

    def head_outputs(self, context_BNSD: Tensor, own: Own) -> Tensor:
        return repeat_heads(context_BNSD, self.num_heads)
