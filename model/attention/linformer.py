"""Linformer (Wang et al., arXiv 2006.04768): keys and values are projected along the sequence, from T tokens to k.

    head_i = softmax(Q_i (E K_i)ᵀ / √d) F V_i,   E and F (k, longest sequence) for all heads of a layer

Every projected key mixes all tokens, so a token sees later ones, whatever the mask: only models that are not causal have it,
and nothing can be cached.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.base import Attention, Own
from model.attention.cache import LayerCache
from model.layers import Layers
from model.positions.masks import AttentionMask
from model.positions.positions import Positions


class LinformerAttention(Attention):
    """MHA over `linformer_length` projected keys and values; rope turns keys before they are projected."""

    def build(self, config: ModelConfig, layers: Layers) -> None:
        assert config.linformer_length is not None
        if config.linformer_tokens is None:
            raise ValueError("the configuration is not resolved: linformer_tokens is null")
        self.sequence = SequenceProjection(layers, config.linformer_length, config.linformer_tokens)

    def extend(self, cache: LayerCache, k_BNSD: Tensor, v_BNSD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        raise ValueError("linformer cannot generate: its keys are projections of complete sequences")

    def unpack(self, k_BNTD: Tensor, v_BNTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values of T tokens → projected ones, (B, N, k, D). What the mask hides is zero before the projection."""
        mask = positions.mask
        if mask.causal or mask.documents_BT is not None:
            raise ValueError("linformer mixes all tokens of a sequence: neither a causal mask nor documents apart are possible")
        if mask.valid_BT is not None:
            hidden_B1T1 = ~mask.valid_BT[:, None, :, None]
            k_BNTD, v_BNTD = k_BNTD.masked_fill(hidden_B1T1, 0), v_BNTD.masked_fill(hidden_B1T1, 0)
        return self.sequence(k_BNTD, v_BNTD)

    def heads(self, q_BNSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, own: Own, positions: Positions, kernel: str) -> Tensor:
        """Every query sees all projected keys."""
        unmasked = replace(positions, mask=AttentionMask(causal=False), _made={}, _of_maps={})
        return super().heads(q_BNSD, k_BNKD, v_BNKD, own, unmasked, kernel)


class SequenceProjection(nn.Module):
    """E (`key`) and F (`value`), which all heads read. A shorter sequence is projected by their first columns."""

    def __init__(self, layers: Layers, length: int, tokens: int) -> None:
        super().__init__()
        self.layers, self.tokens = layers, tokens
        self.key, self.value = (nn.Parameter(torch.zeros(length, tokens)) for _ in range(2))

    def forward(self, k_BNTD: Tensor, v_BNTD: Tensor) -> tuple[Tensor, Tensor]:
        """ValueError for more tokens than columns."""
        tokens = k_BNTD.shape[2]
        if tokens > self.tokens:
            raise ValueError(f"{tokens} tokens, but linformer_tokens is {self.tokens}")
        e_KT, f_KT = (weight[:, :tokens] for weight in self.layers.replicated(self.key, self.value))
        # One product for all heads and sequences; a batched one would copy E for each.
        return torch.einsum("kt,bntd->bnkd", e_KT, k_BNTD), torch.einsum("kt,bntd->bnkd", f_KT, v_BNTD)
