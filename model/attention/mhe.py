"""Multiple Head Embeddings (MHE, arXiv 2310.07911): one shared projection each of Q, K and V; heads differ by three embeddings.

`num_seeds` (ours) gives that many such projections, each to n / num_seeds neighbouring heads with their embeddings. Without
embeddings (`head_embeddings: false`) the heads of a seed are one, as in SHA.

    ADD   Q_i = q + e^Q_i         K_i = k + e^K_i         V_i = v + e^V_i
    MUL   Q_i = q ⊙ (1 + e^Q_i)   K_i = k ⊙ (1 + e^K_i)   V_i = v ⊙ (1 + e^V_i)

K_i and V_i are never materialized. Both variants run as exact multi-query attention: each head's embeddings move from its keys
to its queries and from its values to its output (rows of softmax sum to 1). The heads of ADD also share their scores, unless
embeddings are rotated. docs/attention.md derives each step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.base import Own, Projected
from model.attention.baselines import SingleHeadAttention
from model.attention.faults import may_share_scores
from model.attention.kernels import beside, choose
from model.attention.shared_scores.operator import shared_scores
from model.gha.gram import added_value_gram, multiplied_value_gram
from model.heads import repeat_heads
from model.layers import Layers
from model.positions.positions import Positions
from model.positions.registry import position_kind
from model.positions.rotary import rotate

HEAD_EMBEDDINGS = ("query_embedding", "key_embedding", "value_embedding")


class MHEAttention(SingleHeadAttention):
    """What ADD and MUL share: parameters, and where they apply. The cache holds a K and a V head of width head_dim a seed."""

    def build(self, config: ModelConfig, layers: Layers) -> None:
        self.seeds, self.embedded = config.num_seeds, config.head_embeddings
        # The embeddings are applied before the rotation. If e^K is, key features are twice as wide.
        self.rotates_queries = position_kind(config).rotates and config.embedding_position == "before"
        self.rotates_keys = self.rotates_queries and config.key_embedding
        for name in HEAD_EMBEDDINGS if config.head_embeddings else ():
            if name != "key_embedding" or config.key_embedding:
                self.register_parameter(name, nn.Parameter(torch.zeros(config.num_heads, self.head_dim)))

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        """The seeds' queries before their rotation, (B, G, S, D); `query_features` adds what belongs to each head's keys."""
        return self.query_norm(self.of_seeds(projected)[0])

    def query_features(self, q_BGSD: Tensor, own: Own, positions: Positions) -> Tensor:
        if not self.embedded:
            return super().query_features(rotate(q_BGSD, positions), own, positions)
        return self.embedded_queries(self.to_heads(q_BGSD), own, positions)

    def embedded_queries(self, q_BNSD: Tensor, own: Own, positions: Positions) -> Tensor:
        """`query_features` of the seeds' queries, here repeated for each head, or of the one query that all heads share."""
        raise NotImplementedError

    def to_heads(self, q_BGSD: Tensor) -> Tensor:
        """The query of each of this rank's heads, (B, N, S, D); (B, 1, S, D) if all have the same."""
        return q_BGSD if q_BGSD.shape[1] == 1 else repeat_heads(q_BGSD, self.num_heads)

    def value_gram(self, v_BGTD: Tensor, own: Own, layers: Layers) -> Tensor:
        if self.seeds == 1:
            return self.shared_value_gram(v_BGTD, layers)
        return super().value_gram(self.embedded_values(repeat_heads(v_BGTD, self.num_heads), own), own, layers)

    def embedded_values(self, v_BNTD: Tensor, own: Own) -> Tensor:
        """V_i of each head from its seed's v."""
        raise NotImplementedError

    def shared_value_gram(self, v_B1TD: Tensor, layers: Layers) -> Tensor:
        """`value_gram` of the heads of one seed, which needs neither the values of each head nor those of other ranks."""
        raise NotImplementedError


class MHEAdd(MHEAttention):
    """MHE-ADD: embeddings are added.

    With sinks or a soft-cap Q_i·e^K_i does not cancel: it moves the scores of all keys against the sink, or along the cap. So
    it becomes a channel of queries, 1 in all keys. With sinks the weights of keys do not sum to 1, so e^V_i is multiplied by
    their sum, that of a channel which is 1 in all values.
    """

    def build(self, config: ModelConfig, layers: Layers) -> None:
        super().build(config, layers)
        self.sinks, plain = config.attention_sinks, not config.attention_sinks and config.logit_softcap is None
        self.shares_scores = may_share_scores(config)  # those of the heads of a seed
        self.shifts_scores = self.embedded and config.key_embedding and not self.rotates_keys and not plain

    def heads(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions, kernel: str) -> Tensor:
        choice = choose(
            kernel,
            shares_scores=self.shares_scores,
            device=q_BNSD.device,
            dtype=q_BNSD.dtype,
            heads=self.num_heads // k_BKTD.shape[1],
            head_dim=self.head_dim,
            queries=q_BNSD.shape[2],
            keys=k_BKTD.shape[2],
            softcap=self.softcap,
        )
        if choice.kernel != "shared_scores":
            if self.sinks and self.embedded:
                v_BKTD = beside(v_BKTD, torch.ones_like(v_BKTD[..., :1]))
            return super().heads(q_BNSD, k_BKTD, v_BKTD, own, positions, choice.kernel)
        q_BGSD, bias_ND, seeds = rotate(q_BNSD, positions), query_bias(own), k_BKTD.shape[1]
        slopes_N = [None] * seeds if positions.slopes_N is None else positions.slopes_N.chunk(seeds)
        of_seeds = zip(bias_ND.chunk(seeds), own["value_embedding"].chunk(seeds), slopes_N, strict=True)
        heads = [
            shared_scores(
                q_BGSD[:, seed],
                k_BKTD[:, seed],
                v_BKTD[:, seed],
                bias,
                value_embedding,
                scale=self.scale,
                slopes_N=slopes,
                mask=positions.mask,
            )
            for seed, (bias, value_embedding, slopes) in enumerate(of_seeds)
        ]
        flat = [of_seed_SBND.flatten(2) for of_seed_SBND in heads]
        return flat[0] if seeds == 1 else torch.cat(flat, dim=-1)  # cat copies one tensor, too

    def embedded_queries(self, q_BNSD: Tensor, own: Own, positions: Positions) -> Tensor:
        if self.shifts_scores:
            q_BNSD, e_key_N1D = rotate(q_BNSD, positions) + own["query_embedding"][:, None], own["key_embedding"][:, None]
            return beside(q_BNSD, (q_BNSD * e_key_N1D).sum(-1, keepdim=True))
        if not self.rotates_queries:
            return rotate(q_BNSD, positions) + query_bias(own)[:, None]
        q_BNSD = rotate(q_BNSD + own["query_embedding"][:, None], positions)
        if not self.rotates_keys:
            return q_BNSD
        # Q_i·R_j e^K_i = Σ over channel pairs (a, b) of cos_j (Q_a e_a + Q_b e_b) + sin_j (Q_b e_a − Q_a e_b)
        (first, second), (e_first, e_second) = (x.chunk(2, dim=-1) for x in (q_BNSD, own["key_embedding"][:, None]))
        on_cos, on_sin = first * e_first + second * e_second, second * e_first - first * e_second
        return torch.cat([q_BNSD, on_cos, on_sin], dim=-1)

    def unpack(self, k_BGTD: Tensor, v_BGTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        if self.shifts_scores:
            return beside(k_BGTD, torch.ones_like(k_BGTD[..., :1])), v_BGTD
        rotary = positions.rotary_of(self.head_dim)
        if not self.rotates_keys or rotary is None:
            return k_BGTD, v_BGTD
        tables = torch.cat(rotary, dim=-1).to(k_BGTD.dtype)
        return torch.cat([k_BGTD, tables.expand_as(k_BGTD)], dim=-1), v_BGTD

    def embedded_values(self, v_BNTD: Tensor, own: Own) -> Tensor:
        return v_BNTD + own["value_embedding"][:, None]

    def head_outputs(self, context_BNSD: Tensor, own: Own) -> Tensor:
        if not self.embedded:
            return super().head_outputs(context_BNSD, own)
        if self.sinks:
            averages_BNSD, sums_BNS1 = context_BNSD[..., : self.head_dim], context_BNSD[..., self.head_dim : self.head_dim + 1]
            return averages_BNSD + sums_BNS1 * own["value_embedding"][:, None]
        return self.embedded_values(context_BNSD, own)

    def shared_value_gram(self, v_B1TD: Tensor, layers: Layers) -> Tensor:
        return added_value_gram(v_B1TD, self.get_parameter("value_embedding"), layers)


class MHEMul(MHEAttention):
    """MHE-MUL: embeddings scale channels."""

    def split_keys_values(self, projected: Projected, positions: Positions) -> tuple[Tensor, Tensor]:
        """Rotate the shared key, unless e^K is applied before the rotation; then `unpack` rotates it."""
        if not self.rotates_keys:
            return super().split_keys_values(projected, positions)
        _, k_BGSD, v_BGSD = self.of_seeds(projected)
        return self.key_norm(k_BGSD), v_BGSD

    def embedded_queries(self, q_BNSD: Tensor, own: Own, positions: Positions) -> Tensor:
        e_query, e_key = own["query_embedding"][:, None], own["key_embedding"][:, None] if "key_embedding" in own else None
        if not self.rotates_queries:
            if e_key is not None:
                wide = torch.promote_types(e_query.dtype, torch.float32)
                e_query, e_key = e_query.to(wide), e_key.to(wide)
                e_query = e_query + e_key + e_query * e_key
            return scale_by_one_plus(rotate(q_BNSD, positions), e_query)
        q_BNSD = rotate(scale_by_one_plus(q_BNSD, e_query), positions)
        if e_key is None:
            return q_BNSD
        # Q_i·R_j(k ⊙ c) = Σ_c c_c k_c (cos_j Q_c + sin_j (rotᵀ Q)_c), rotᵀ taking the pair (a, b) to (b, −a)
        first, second = q_BNSD.chunk(2, dim=-1)
        turned_BNSD = torch.cat([second, -first], dim=-1)
        return torch.cat([scale_by_one_plus(x_BNSD, e_key) for x_BNSD in (q_BNSD, turned_BNSD)], dim=-1)

    def unpack(self, k_BGTD: Tensor, v_BGTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        rotary = positions.rotary_of(self.head_dim)
        if not self.rotates_keys or rotary is None:
            return k_BGTD, v_BGTD
        cos, sin = (torch.cat([table, table], dim=-1) for table in rotary)
        return torch.cat([k_BGTD * cos, k_BGTD * sin], dim=-1).to(k_BGTD.dtype), v_BGTD

    def head_outputs(self, context_BNSD: Tensor, own: Own) -> Tensor:
        return self.embedded_values(context_BNSD, own) if self.embedded else super().head_outputs(context_BNSD, own)

    def embedded_values(self, v_BNTD: Tensor, own: Own) -> Tensor:
        return scale_by_one_plus(v_BNTD, own["value_embedding"][:, None])

    def shared_value_gram(self, v_B1TD: Tensor, layers: Layers) -> Tensor:
        return multiplied_value_gram(v_B1TD, self.get_parameter("value_embedding"), layers)


def query_bias(own: Own) -> Tensor:
    """MHE-ADD's e^Q, (N, D), when e^K has no effect.

    Q_i·e^K_i is then the same for every key and cancels in softmax. Adding 0·e^K gives the idle parameter its true gradient,
    zero, instead of none: distributed engines wait for a gradient of every parameter.
    """
    e_query, e_key = own["query_embedding"], own.get("key_embedding")
    return e_query if e_key is None else e_query + 0 * e_key


def scale_by_one_plus(x_BNSD: Tensor, e: Tensor) -> Tensor:
    """x ⊙ (1 + e) in the type of x, rounded once.

    Computing 1 + e in bf16 would lose e: numbers near 1 are 2^-7 apart there, as much as a third of a typical embedding. e
    alone keeps its digits, and addcmul adds x ⊙ e to x in float32 without a float32 copy of x for each head.
    """
    return torch.addcmul(x_BNSD, x_BNSD, e.to(x_BNSD.dtype))
