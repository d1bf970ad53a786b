"""Heads from factors of low rank: of the projection of queries (MFA, MHE-ADD of low rank), or of each token (TPA).

    MFA            Q_i = norm(x S) W_i              K_i = k            V_i = v            (Hu et al., arXiv 2412.19255)
    mhe_low_rank   Q_i = q + x U W_i + e^Q_i        K_i = k + e^K_i    V_i = v + e^V_i    (ours)
    TPA            Q_i = Σ_r a_ri(x) b_r(x) / R_Q   K_i and V_i likewise                  (Zhang et al., arXiv 2501.06425)

S, U and W_i are weights; a_ri, a number, and b_r, a vector, are linear functions of the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.attention.base import Attention, Projected
from model.attention.head_norm import HeadNorm
from model.attention.mhe import MHEAdd
from model.heads import split_heads
from model.layers import Layers
from model.positions.positions import Positions
from model.positions.rotary import rotate


class MultiMatrixAttention(Attention):
    """MFA: multi-query attention whose projection of queries is a product of two, with RMSNorm between them."""

    of_queries = ("query_down",)

    def build(self, config: ModelConfig, layers: Layers) -> None:
        assert config.query_rank is not None
        self.query_down_norm = HeadNorm(layers, config.query_rank, config.norm_epsilon)

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        query_SBF = self.get_submodule("query")(self.query_down_norm(projected["query_down"]))
        return super().split_queries({"query": query_SBF}, positions)


class MHELowRank(MHEAdd):
    """MHE-ADD whose heads add a product of low rank to the shared query. Rank 0 is MHE-ADD, full rank contains MQA.

    The latent x U has no norm: only so does full rank contain MQA. qk_norm norms a head's sum, before its embedding.
    """

    def build(self, config: ModelConfig, layers: Layers) -> None:
        super().build(config, layers)
        self.low_rank = bool(config.query_rank)
        if self.low_rank:
            self.of_queries = (*self.of_queries, "query_down")

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        """The query of each head before its embedding and rotation, (B, N, S, D)."""
        if not self.low_rank:
            return super().split_queries(projected, positions)
        own_SBF = self.get_submodule("query")(projected["query_down"])
        q_BNSD = self.to_heads(self.of_seeds(projected)[0]) + split_heads(own_SBF, self.head_dim)
        return self.query_norm(q_BNSD)


class TensorProductAttention(Attention):
    """TPA: a token's queries are a sum of outer products of factors over heads and factors over channels; keys and values too.

    RoPE rotates the factors over channels, the same for all heads. The cache keeps factors, from which all keys and values are
    made again in each pass.
    """

    of_queries = ("query_head_factors", "query_channel_factors")
    of_keys_values = ("key_value_head_factors", "key_value_channel_factors")

    def build(self, config: ModelConfig, layers: Layers) -> None:
        assert config.key_rank is not None
        self.key_rank = config.key_rank

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        heads_BRSN, channels_BRSD = self.factors(projected, self.of_queries)
        return outer_products(heads_BRSN, rotate(channels_BRSD, positions))

    def split_keys_values(self, projected: Projected, positions: Positions) -> tuple[Tensor, Tensor]:
        """Of keys and of values, the factors over heads and over channels side by side, (B, R, S, N + D) each."""
        heads_BRSN, channels_BRSD = self.factors(projected, self.of_keys_values)
        keys_BRSD = rotate(channels_BRSD[:, : self.key_rank], positions)
        key_BRSF = torch.cat([heads_BRSN[:, : self.key_rank], keys_BRSD], dim=-1)
        return key_BRSF, torch.cat([heads_BRSN[:, self.key_rank :], channels_BRSD[:, self.key_rank :]], dim=-1)

    def factors(self, projected: Projected, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """The factors over this rank's heads, (B, R, S, N), and over channels, (B, R, S, D)."""
        heads_SBF, channels_SBF = (projected[name] for name in names)
        heads_BRSN = heads_SBF.unflatten(-1, (self.num_heads, -1)).permute(1, 3, 0, 2)
        return heads_BRSN, split_heads(channels_SBF, self.head_dim)

    def unpack(self, k_BRTF: Tensor, v_BRTF: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values of each head, (B, N, T, D)."""
        return self.products_of(k_BRTF), self.products_of(v_BRTF)

    def products_of(self, factors_BRTF: Tensor) -> Tensor:
        return outer_products(*factors_BRTF.split([self.num_heads, self.head_dim], dim=-1))


def outer_products(heads_BRSN: Tensor, channels_BRSD: Tensor) -> Tensor:
    """The mean over ranks of the outer products of both factors, (B, N, S, D)."""
    return torch.einsum("brsn,brsd->bnsd", heads_BRSN / heads_BRSN.shape[1], channels_BRSD)
