"""What all attention variants share: one forward pass, in steps that a variant overrides."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.head_norm import HeadNorm
from model.attention.kernels import attend
from model.attention.registry import OUTPUT_GATE, projections_of, variant_of
from model.attention.variant import Projection
from model.gha.constraint import FeatureMaps, HeadConstraint
from model.gha.gram import value_gram
from model.heads import merge_heads, split_heads
from model.layers import Layers
from model.positions.positions import Positions
from model.positions.rotary import rotate

SINK = "sink"  # the parameter of attention_sinks, (N, 1)
Own = Mapping[str, Tensor]  # rows of this rank's heads, (N, …), by the names of the parameters
Projected = Mapping[str, Tensor]  # what this rank has of projections, (S, B, columns) each, by their names


class Attention(nn.Module):
    """One attention layer; `forward` lists its steps.

    A variant gets the projections of its registry entry under their names, and overrides the steps in which it differs. By
    default each head has its own queries (`query`), on K key/value heads (`key_value`, head by head: [k_1 v_1 k_2 v_2 …]).

    A parameter that a variant registers on itself, not on a layer, has one row for each of the model's heads.
    """

    query_norm: Callable[[Tensor], Tensor]
    key_norm: Callable[[Tensor], Tensor]
    of_queries: tuple[str, ...] = ("query",)  # the projections of hidden states that queries need
    of_keys_values: tuple[str, ...] = ("key_value",)  # and those that keys and values need

    def __init__(self, config: ModelConfig, layers: Layers, number: int = 0) -> None:
        """`config`: that of the layer (`layer_configs`); `number`: which of the model's layers it is, from 0."""
        super().__init__()
        self.number = number
        self.head_dim, self.kernel = config.head_width, config.attention_kernel
        self.scale = self.head_dim**-0.5
        own = layers.own(config.num_heads)
        self.num_heads = own.stop - own.start  # of this rank
        self.layers = layers
        for name, projection in projections_of(config).items():
            self.add_module(name, projection_layer(layers, config, projection))
        self.of_output = () if config.output_gate is None else (OUTPUT_GATE,)
        width = variant_of(config).normed_width(config)
        # Not nn.Identity where there is no norm: Megatron asks every submodule for its part of a checkpoint.
        self.query_norm, self.key_norm = (
            HeadNorm(layers, width, config.norm_epsilon) if config.qk_norm else _unchanged for _ in range(2)
        )
        self.softcap = config.logit_softcap
        self.build(config, layers)
        if config.attention_sinks:
            self.sink = nn.Parameter(torch.zeros(config.num_heads, 1))
        of_shapes: dict[torch.Size, list[str]] = {}  # ranks move together what has rows of one width
        for name, parameter in self.named_parameters(recurse=False):
            of_shapes.setdefault(parameter.shape, []).append(name)
        self._own_names = tuple(of_shapes.values())
        self.out = layers.row(config.num_heads * self.head_dim, config.hidden_size, config.bias)
        self.constraint: HeadConstraint | None = None

    def build(self, config: ModelConfig, layers: Layers) -> None:
        """Make what the variant needs besides its projections."""

    def forward(self, x_SBH: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Self-attention, (S, B, H) → (S, B, H)."""
        projected = self.project(x_SBH, *self.of_queries, *self.of_keys_values, *self.of_output)
        q_BNSD = self.split_queries(projected, positions)
        k_BKTD, v_BKTD = self.split_keys_values(projected, positions)
        own = self.own_rows()
        if cache is not None:
            k_BKTD, v_BKTD = self.extend(cache, k_BKTD, v_BKTD, positions)
            heads_SBF = self.gated(self.cached_heads(q_BNSD, k_BKTD, v_BKTD, own, positions), projected)
        else:
            k_BKTD, v_BKTD = self.unpack(k_BKTD, v_BKTD, positions)
            heads_SBF = self.gated(self.heads(q_BNSD, k_BKTD, v_BKTD, own, positions, self.kernel), projected)
            if self.constraint is not None:
                maps = self.observe(q_BNSD, k_BKTD, v_BKTD, own, positions, self.constraint.layers)
                heads_SBF = self.constraint(heads_SBF, maps)
        out_SBH: Tensor = self.out(heads_SBF)
        return out_SBH

    def queries(self, x_SBH: Tensor, positions: Positions) -> Tensor:
        """Queries of a stream, (B, N, S, D); N is 1 if all heads share one."""
        return self.split_queries(self.project(x_SBH, *self.of_queries), positions)

    def keys_values(self, y_SBH: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, K, T, D) each, of any stream with its own positions, for `unpack` and `heads`."""
        return self.split_keys_values(self.project(y_SBH, *self.of_keys_values), positions)

    def project(self, x_SBH: Tensor, *names: str) -> Projected:
        """The projections of these names, of one stream; ranks communicate it once for all."""
        distinct = tuple(dict.fromkeys(names))
        outputs = self.layers.project(x_SBH, *(self.get_submodule(name) for name in distinct))
        return dict(zip(distinct, outputs, strict=True))

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        """Projected queries → (B, N, S, D); N is 1 if all heads share one."""
        return rotate(self.query_norm(split_heads(projected["query"], self.head_dim)), positions)

    def split_keys_values(self, projected: Projected, positions: Positions) -> tuple[Tensor, Tensor]:
        """Projected keys and values → (B, K, S, D) each, as the cache keeps them."""
        k_BKSD, v_BKSD = split_heads(projected["key_value"], 2 * self.head_dim).chunk(2, dim=-1)
        return rotate(self.key_norm(k_BKSD), positions), v_BKSD

    def extend(self, cache: LayerCache, k_BKSD: Tensor, v_BKSD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Cache the keys and values of this pass; return those of all T tokens."""
        return cache.append(k_BKSD, v_BKSD, positions.offset)

    def unpack(self, k_BKTD: Tensor, v_BKTD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Keys and values as the cache keeps them → as `heads` reads them; keys as wide as `query_features` makes queries."""
        return k_BKTD, v_BKTD

    def cached_heads(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions) -> Tensor:
        """`heads` of keys and values as the cache keeps them."""
        return self.heads(q_BNSD, *self.unpack(k_BKTD, v_BKTD, positions), own, positions, self.kernel)

    def own_rows(self) -> Own:
        """This rank's rows of the parameters that have one row per head.

        Called once per pass, so that ranks gather the gradients of all these parameters of one shape in one collective.
        """
        own: dict[str, Tensor] = {}
        for names in self._own_names:
            rows = self.layers.own_heads(*(self.get_parameter(name) for name in names))
            own |= dict(zip(names, rows, strict=True))
        return own

    def heads(self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions, kernel: str) -> Tensor:
        """The concatenated outputs of this rank's heads, (S, B, N·D), of keys and values from `unpack`."""
        features_BNSD = self.query_features(q_BNSD, own, positions)
        context_BNSD = attend(
            features_BNSD,
            k_BKTD,
            v_BKTD,
            positions,
            scale=self.scale,
            kernel=kernel,
            sinks_N1=own.get(SINK),
            softcap=self.softcap,
        )
        return merge_heads(self.head_outputs(context_BNSD, own))

    def query_features(self, q_BNSD: Tensor, own: Own, positions: Positions) -> Tensor:
        """The left factor of each head's scores: `queries` → (B, N, S, D), or wider if `unpack` makes keys wider."""
        return q_BNSD

    def head_outputs(self, context_BNSD: Tensor, own: Own) -> Tensor:
        """Weighted averages of values → the outputs of heads, (B, N, S, D)."""
        return context_BNSD

    def gated(self, heads_SBF: Tensor, projected: Projected) -> Tensor:
        """The concatenated outputs of heads times their gates, if they have any (Qiu et al., arXiv 2505.06708)."""
        for name in self.of_output:
            gates_SBF = projected[name].sigmoid()
            width = heads_SBF.shape[-1] // gates_SBF.shape[-1]  # channels that share a gate: of one head, or one
            heads_SBF = (heads_SBF.unflatten(-1, (-1, width)) * gates_SBF[..., None]).flatten(-2)
        return heads_SBF

    def observe(
        self, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, own: Own, positions: Positions, layers: Layers
    ) -> FeatureMaps:
        """The feature maps of this pass, computed on demand from the outputs of `unpack`."""
        return FeatureMaps(
            positions,
            self.scale,
            values=v_BKTD,
            value_gram=lambda values_BKTD: self.value_gram(values_BKTD, own, layers),
            queries=lambda rows_R: self.query_features(q_BNSD[:, :, rows_R], own, positions.of_rows(rows_R)),
            keys=k_BKTD,
        )

    def value_gram(self, v_BKTD: Tensor, own: Own, layers: Layers) -> Tensor:
        """V_i·V_j over all tokens, for all heads of all ranks, (N, N)."""
        return value_gram(v_BKTD, layers)


def _unchanged(x: Tensor) -> Tensor:
    return x


class SharedProjection(Attention):
    """One projection each of Q, K and V for all heads, or for each of `num_seeds` groups of neighbours, in one layer `qkv`.

    Its outputs are ordered by seed: [q_1 k_1 v_1 q_2 k_2 v_2 …].
    """

    of_queries: tuple[str, ...] = ("qkv",)
    of_keys_values = ("qkv",)

    def split_queries(self, projected: Projected, positions: Positions) -> Tensor:
        """The seeds' queries, (B, G, S, D)."""
        q_BGSD, _, _ = self.of_seeds(projected)
        return rotate(self.query_norm(q_BGSD), positions)

    def split_keys_values(self, projected: Projected, positions: Positions) -> tuple[Tensor, Tensor]:
        _, k_BGSD, v_BGSD = self.of_seeds(projected)
        return rotate(self.key_norm(k_BGSD), positions), v_BGSD

    def of_seeds(self, projected: Projected) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the seeds, (B, G, S, D) each, as projected."""
        q_BGSD, k_BGSD, v_BGSD = split_heads(projected["qkv"], 3 * self.head_dim).chunk(3, dim=-1)
        return q_BGSD, k_BGSD, v_BGSD


def projection_layer(layers: Layers, config: ModelConfig, projection: Projection) -> nn.Module:
    """The layer that a variant declares."""
    parts, width, hidden, bias = projection.parts, projection.width, config.hidden_size, config.bias
    match projection.kind:
        case "column":
            return layers.column(hidden, parts * width, bias)
        case "key_value":
            return layers.key_value(hidden, parts, width, bias)
        case "shared":
            return layers.shared(hidden, parts, width, bias)
        case "expand":
            assert projection.inputs is not None
            return layers.expand(projection.inputs, projection.groups, parts * width, bias)
        case "channels":
            return layers.own_channels()
