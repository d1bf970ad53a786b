"""What all attention variants share: one forward pass, in steps that a variant overrides."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.kernels import attend
from model.gha.constraint import FeatureMaps, HeadConstraint
from model.gha.gram import value_gram
from model.heads import merge_heads, split_heads
from model.layers import Layers
from model.positions.positions import Positions
from model.positions.rotary import rotate

Own = Mapping[str, Tensor]  # rows of this rank's heads, (N, …), by the names of the parameters


class Attention(nn.Module):
    """One attention layer; `forward` lists its steps.

    A variant makes its projections in `build` and overrides the steps in which it differs. By default each head has its own
    queries (`self.query`), on K key/value heads (`self.key_value`, head by head: [k_1 v_1 k_2 v_2 …]).

    A parameter that a variant registers on itself, not on a layer, has one row for each of the model's heads.
    """

    query: nn.Module
    key_value: nn.Module

    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.head_dim, self.kernel = config.head_width, config.attention_kernel
        own = layers.own(config.num_heads)
        self.num_heads = own.stop - own.start  # of this rank
        self.layers = layers
        self.build(config, layers)
        self._own_names = tuple(name for name, _ in self.named_parameters(recurse=False))
        self.out = layers.row(config.num_heads * self.head_dim, config.hidden_size, config.bias)
        self.constraint: HeadConstraint | None = None

    def build(self, config: ModelConfig, layers: Layers) -> None:
        """Make all parameters except the output projection."""
        raise NotImplementedError

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Self-attention, (S, B, H) → (S, B, H)."""
        query_SBD, key_value_SBD = self.project(x_SBH)
        q_BNSD = self.split_queries(query_SBD, positions)
        k_BKTD, v_BKTD = self.split_keys_values(key_value_SBD, positions)
        if cache is not None:
            k_BKTD, v_BKTD = self.extend(cache, k_BKTD, v_BKTD, positions)
        own = self.own_rows()
        heads_SBF = self.heads(q_BNSD, self.key_features(k_BKTD, positions), v_BKTD, own, positions, self.kernel)
        if self.constraint is not None and cache is None:
            maps = self.observe(q_BNSD, k_BKTD, v_BKTD, own, positions, self.constraint.layers)
            heads_SBF = self.constraint(heads_SBF, maps)
        out_SBH: Tensor = self.out(heads_SBF)
        return out_SBH

    def queries(self, x_SBH: Tensor, positions: Positions) -> Tensor:
        """Queries of a stream, (B, N, S, D); N is 1 if all heads share one."""
        return self.split_queries(self.project_queries(x_SBH), positions)

    def keys_values(self, y_SBH: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, K, T, D) each, of any stream with its own positions, for `key_features` and `heads`."""
        return self.split_keys_values(self.project_keys_values(y_SBH), positions)

    def project(self, x_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """`project_queries` and `project_keys_values` of one stream; ranks communicate it once for both."""
        query_SBD, key_value_SBD = self.layers.project(x_SBH, self.query, self.key_value)
        return query_SBD, key_value_SBD

    def project_queries(self, x_SBH: Tensor) -> Tensor:
        (query_SBD,) = self.layers.project(x_SBH, self.query)
        return query_SBD

    def project_keys_values(self, y_SBH: Tensor) -> Tensor:
        (key_value_SBD,) = self.layers.project(y_SBH, self.key_value)
        return key_value_SBD

    def split_queries(self, query_SBD: Tensor, positions: Positions) -> Tensor:
        """Projected queries → (B, N, S, D); N is 1 if all heads share one."""
        return rotate(split_heads(query_SBD, self.head_dim), positions)

    def split_keys_values(self, key_value_SBD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Projected keys and values → (B, K, S, D) each, as the cache keeps them."""
        k_BKSD, v_BKSD = split_heads(key_value_SBD, 2 * self.head_dim).chunk(2, dim=-1)
        return rotate(k_BKSD, positions), v_BKSD

    def extend(self, cache: LayerCache, k_BKSD: Tensor, v_BKSD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Cache the keys and values of this pass; return those of all T tokens."""
        return cache.append(k_BKSD, v_BKSD, positions.offset)

    def own_rows(self) -> Own:
        """This rank's rows of the parameters that have one row per head.

        Called once per pass, so that ranks gather the gradients of all these parameters in one collective.
        """
        if not self._own_names:
            return {}
        rows = self.layers.own_heads(*(self.get_parameter(name) for name in self._own_names))
        return dict(zip(self._own_names, rows, strict=True))

    def heads(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions, kernel: str) -> Tensor:
        """The concatenated outputs of this rank's heads, (S, B, N·D). `k_BKTD` are the outputs of `key_features`."""
        features_BNSD = self.query_features(q_BNSD, own, positions)
        context_BNSD = attend(features_BNSD, k_BKTD, v_BKTD, positions, scale=self.head_dim**-0.5, kernel=kernel)
        return merge_heads(self.head_outputs(context_BNSD, own))

    def query_features(self, q_BNSD: Tensor, own: Own, positions: Positions) -> Tensor:
        """The left factor of each head's scores: `queries` → (B, N, S, D), or wider if `key_features` are."""
        return q_BNSD

    def key_features(self, k_BKTD: Tensor, positions: Positions) -> Tensor:
        """The right factor of the scores: fresh or cached keys → (B, K, T, D), or wider if `query_features` are."""
        return k_BKTD

    def head_outputs(self, context_BNSD: Tensor, own: Own) -> Tensor:
        """Weighted averages of values → the outputs of heads, (B, N, S, D)."""
        return context_BNSD

    def observe(
        self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions, layers: Layers
    ) -> FeatureMaps:
        """The feature maps of this pass, computed on demand."""
        return FeatureMaps(
            positions,
            values=v_BKTD,
            value_gram=lambda values_BKTD: self.value_gram(values_BKTD, own, layers),
            queries=lambda rows_R: self.query_features(q_BNSD[:, :, rows_R], own, positions.of_rows(rows_R)),
            keys=lambda: self.key_features(k_BKTD, positions),
        )

    def value_gram(self, v_BKTD: Tensor, own: Own, layers: Layers) -> Tensor:
        """V_i·V_j over all tokens, for all heads of all ranks, (N, N)."""
        return value_gram(v_BKTD, layers)


class SharedProjection(Attention):
    """One projection each of Q, K and V for all heads, or for each of `num_seeds` groups of neighbours, in one layer `qkv`.

    Its outputs are ordered by seed: [q_1 k_1 v_1 q_2 k_2 v_2 …].
    """

    def build(self, config: ModelConfig, layers: Layers) -> None:
        self.qkv = layers.shared(config.hidden_size, config.num_seeds, 3 * self.head_dim, config.bias)

    def project(self, x_SBH: Tensor) -> tuple[Tensor, Tensor]:
        of_seeds_SBGD = self.qkv(x_SBH).unflatten(-1, (-1, 3 * self.head_dim))
        query_SBGD, key_value_SBGD = of_seeds_SBGD.split([self.head_dim, 2 * self.head_dim], dim=-1)
        return query_SBGD.flatten(-2), key_value_SBGD.flatten(-2)

    def project_queries(self, x_SBH: Tensor) -> Tensor:
        return self.project(x_SBH)[0]

    def project_keys_values(self, y_SBH: Tensor) -> Tensor:
        return self.project(y_SBH)[1]
