"""Keys and values of heads from latents (MLA, GLA), or keys that are half of the values (GTA).

Latent attention of head i, with the latent c of its group, RMSNorm included, and one key for all heads, k^S:

    k_i = W^K_i c + b^K_i     v_i = W^V_i c + b^V_i     score = (q_i·k_i + q^S_i·k^S) / √(d + d_S)

RoPE rotates q^S_i and k^S only, so that W^K_i can move to the query and W^V_i behind the average (the absorbed form):

    q_i·k_i = (W^K_iᵀ q_i)·c + (the same for every key, cancels in softmax)     Σ w_j v_ij = W^V_i Σ w_j c_j + b^V_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.attention.base import Attention, Own, Projected
from model.attention.head_norm import HeadNorm
from model.heads import merge_heads, split_heads
from model.layers import Layers
from model.positions.positions import Positions
from model.positions.rotary import rotate


class LatentAttention(Attention):
    """MLA (DeepSeek-V2, arXiv 2405.04434) and, with several latents, GLA (arXiv 2505.21487).

    A token's keys and values are expanded from its latents: in a pass without a cache, and for a prompt. To generate, heads
    attend to the latents themselves (the absorbed form), so that keys and values of heads are never made.
    """

    def build(self, config: ModelConfig, layers: Layers) -> None:
        self.shared_width, low_rank = config.rope_dim or 0, config.query_rank is not None
        self.scale = (self.head_dim + self.shared_width) ** -0.5
        if config.query_rank is not None:
            self.query_latent_norm = HeadNorm(layers, config.query_rank, config.norm_epsilon)
        self.sinks = config.attention_sinks
        self.latent_width = (config.latent_dim or 0) // (config.num_latents or 1)
        self.latent_norm = HeadNorm(layers, self.latent_width, config.norm_epsilon)
        self.of_queries = ("query_latent",) if low_rank else ("query",)
        self.of_keys_values = ("latent", "shared_key") if self.shared_width else ("latent",)

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        """(B, N, S, D + shared width): what a head's own key and what the shared key is multiplied with."""
        if "query_latent" in projected:
            query_SBF = self.get_submodule("query")(self.query_latent_norm(projected["query_latent"]))
        else:
            query_SBF = projected["query"]
        q_BNSD, shared_BNSD = self.own_and_shared(split_heads(query_SBF, self.head_dim + self.shared_width))
        return torch.cat([q_BNSD, rotate(shared_BNSD, positions)], dim=-1) if self.shared_width else q_BNSD

    def split_keys_values(self, projected: Projected, positions: Positions) -> tuple[Tensor, Tensor]:
        """The normed latents, and the shared key, side by side as one key head, (B, 1, S, F). There are no values."""
        latents_SBGC = self.latent_norm(projected["latent"].unflatten(-1, (-1, self.latent_width)))
        kept_B1SF = latents_SBGC.flatten(-2).transpose(0, 1)[:, None]
        if self.shared_width:
            shared_B1SD = rotate(split_heads(projected["shared_key"], self.shared_width), positions)
            kept_B1SF = torch.cat([kept_B1SF, shared_B1SD], dim=-1)
        return kept_B1SF, kept_B1SF[:, :0]

    def unpack(self, k_B1TF: Tensor, v_B0TF: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """The expanded form: keys and values of heads, (B, N, T, D + shared width) and (B, N, T, D)."""
        latents_BTC, shared_B1TD = k_B1TF[:, 0].split([k_B1TF.shape[-1] - self.shared_width, self.shared_width], dim=-1)
        key_value_BNTD = self.get_submodule("key_value")(latents_BTC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_BNTD, v_BNTD = key_value_BNTD.chunk(2, dim=-1)
        if self.shared_width:
            k_BNTD = torch.cat([k_BNTD, shared_B1TD[:, None].expand(-1, self.num_heads, -1, -1)], dim=-1)
        return k_BNTD, v_BNTD

    def cached_heads(self, q_BNSD: Tensor, k_B1TF: Tensor, v_B0TF: Tensor, own: Own, positions: Positions) -> Tensor:
        if not self.absorbs(q_BNSD.shape[2], k_B1TF.shape[2], k_B1TF.shape[3]):
            return super().cached_heads(q_BNSD, k_B1TF, v_B0TF, own, positions)
        return self.absorbed_heads(q_BNSD, k_B1TF, own, positions)

    def absorbs(self, queries: int, keys: int, cached: int) -> bool:
        """Whether the absorbed form takes fewer multiplications than expanding all keys, for each head.

        It leaves out q·b^K, which cancels only in a plain softmax, and the sum of weights, which is not 1 with a sink.
        """
        if self.softcap is not None or self.sinks:
            return False
        moved, latent = 2 * self.head_dim * self.latent_width, queries * keys * 2 * cached
        return latent + queries * moved < queries * keys * (2 * self.head_dim + self.shared_width) + keys * moved

    def absorbed_heads(self, q_BNSD: Tensor, k_B1TF: Tensor, own: Own, positions: Positions) -> Tensor:
        """`heads` as multi-query attention to what the cache keeps, which is key and value of all heads.

        With several latents a query is zero on those of other heads: so nothing of the cache is copied.
        """
        latents = (k_B1TF.shape[-1] - self.shared_width) // self.latent_width
        reads_NG = torch.eye(latents, dtype=q_BNSD.dtype, device=q_BNSD.device)
        reads_NG = reads_NG.repeat_interleave(self.num_heads // latents, dim=0)
        expand = self.get_submodule("key_value")
        key_NDC, value_NDC = expand.get_parameter("weight").unflatten(0, (self.num_heads, 2, -1)).unbind(1)

        own_BNSD, shared_BNSD = self.own_and_shared(q_BNSD)
        features_BNSGC = (own_BNSD @ key_NDC)[..., None, :] * reads_NG[:, None, :, None]
        features_BNSF = torch.cat([features_BNSGC.flatten(-2), shared_BNSD], dim=-1)
        averages_SBF = self.heads(features_BNSF, k_B1TF, k_B1TF, own, positions, self.kernel)
        averages_BNSF = split_heads(averages_SBF, k_B1TF.shape[-1])[..., : latents * self.latent_width]
        averages_BNSC = (averages_BNSF.unflatten(-1, (latents, -1)) * reads_NG[:, None, :, None]).sum(-2)
        heads_BNSD = averages_BNSC @ value_NDC.mT
        if expand.bias is not None:
            bias_N1D = expand.get_parameter("bias").unflatten(0, (self.num_heads, 2, -1))[:, 1:]
            heads_BNSD = heads_BNSD + (bias_N1D if positions.blind is None else bias_N1D * ~positions.blind)
        return merge_heads(heads_BNSD)

    def own_and_shared(self, q_BNSD: Tensor) -> tuple[Tensor, Tensor]:
        """The channels of queries for the keys of heads, and those for the shared key."""
        own_BNSD, shared_BNSD = q_BNSD.split([self.head_dim, self.shared_width], dim=-1)
        return own_BNSD, shared_BNSD


class GroupedTiedAttention(Attention):
    """GTA (arXiv 2505.21487): K value heads, each for n/K neighbours; the first half of a value is the first half of its key.

    The other half is one key for all heads. RoPE rotates only this half, of keys and of queries.
    """

    of_keys_values = ("key_value", "shared_key")

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        own_BNSC, shared_BNSC = split_heads(projected["query"], self.head_dim).chunk(2, dim=-1)
        return torch.cat([own_BNSC, rotate(shared_BNSC, positions)], dim=-1)

    def split_keys_values(self, projected: Projected, positions: Positions) -> tuple[Tensor, Tensor]:
        """The half key that all heads share, (B, 1, S, D/2), and values, (B, K, S, D)."""
        shared_B1SC = split_heads(projected["shared_key"], self.head_dim // 2)
        return rotate(shared_B1SC, positions), split_heads(projected["key_value"], self.head_dim)

    def unpack(self, k_B1TC: Tensor, v_BKTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        tied_BKTC = v_BKTD[..., : self.head_dim // 2]
        return torch.cat([tied_BKTC, k_B1TC.expand_as(tied_BKTC)], dim=-1), v_BKTD
