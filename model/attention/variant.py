"""What an attention variant declares, for code that must not import its class. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from configs.schema import Fault, ModelConfig

Count = Callable[[ModelConfig], int]
Rules = Callable[[ModelConfig], Iterable[Fault]]
Kept = Sequence[Sequence[int]]  # for each layer the heads to keep, ascending
KERNELS = ("auto", "math", "sdpa")  # values of attention_kernel that every variant supports
MAPS = ("value", "attention", "output")  # values of gha.feature_map


@dataclass(frozen=True)
class Projection:
    """A linear layer of an attention module: `parts` equal parts of `width` outputs, and which heads read them.

    `column`: every head has the same number of parts, its own. `key_value`: a part is that of neighbouring heads. `shared`:
    heads of several ranks read a part in full. `expand`: as `column`, but computed from what a rank already has for all tokens:
    from `groups` latents of width `inputs`, each for neighbouring heads. `channels`: as `column`, but no layer: the channels of
    the hidden state itself. All but `expand` read the hidden state.
    """

    kind: Literal["column", "key_value", "shared", "expand", "channels"]
    parts: int
    width: int
    inputs: int | None = None
    groups: int = 1

    @property
    def columns(self) -> int:
        """Outputs that have weights."""
        return 0 if self.kind == "channels" else self.parts * self.width

    def values(self, hidden_size: int, bias: bool) -> int:
        """How many its weights and, with `bias`, its biases are."""
        return self.columns * ((self.inputs or hidden_size) + bias)

    def is_gathered(self, ranks: int) -> bool:
        """Whether tensor-parallel ranks gather it: none has all that its heads read."""
        return self.kind == "shared" and (self.parts == 1 or self.parts % ranks != 0)


Projections = Mapping[str, Projection]  # by their names in the attention module


class Cached(NamedTuple):
    """What the cache keeps of a token in one layer: `key_heads` vectors of `key_width`, and likewise values."""

    key_heads: int
    key_width: int
    value_heads: int
    value_width: int

    @property
    def values(self) -> int:
        """How many numbers that is."""
        return self.key_heads * self.key_width + self.value_heads * self.value_width


def alike(heads: Count) -> Callable[[ModelConfig], Cached]:
    """A cache of `heads` keys and as many values, each head_dim wide."""
    return lambda config: Cached(heads(config), config.head_width, heads(config), config.head_width)


@dataclass(frozen=True)
class Pruning:
    """How heads are pruned from a layer; model/gha/pruning.py does it, by the layer's projections.

    Parameters of the attention module itself have a row for each head. `config`: what changes in the configuration besides
    num_heads; `follows_vote`: whether this depends on which heads are kept, not only on how many.
    """

    config: Callable[[ModelConfig, Kept], dict[str, object]] = lambda config, kept: {}
    follows_vote: Callable[[ModelConfig], bool] = lambda config: False


@dataclass(frozen=True)
class StockForm:
    """The variant as grouped-query attention with biases, which stock architectures have; model/huggingface/fold.py folds it.

    `fold` is the FoldedAttention as "module:Class", `kv_heads` its heads of keys and values. `refusal` says why a configuration
    has no such form, and what to change. `adds_biases`: it has biases even if the configuration has none.
    """

    fold: str
    kv_heads: Count
    refusal: Callable[[ModelConfig], str | None] = lambda config: None
    adds_biases: bool = False


def _head_columns(config: ModelConfig) -> tuple[int, int]:
    return config.num_heads * config.head_width, config.num_heads * config.head_width


@dataclass(frozen=True)
class Variant:
    """One attention variant: its class, its parameters, its costs, the configuration fields it reads, and what it supports.

    `target` is the class as "module:Class". `projections` are its linear layers except the output projection: the class gets
    them built, tensor parallelism shards them and all costs follow. `embeddings` is the size of the parameters that have a row
    for each head, `vectors` the sizes of those that all heads read (such as norms of heads), in the order of their calls.

    `cached`: what the cache keeps. `products`: the columns of all heads' queries and of their values, as multiplied for each
    key that a query sees. `rotary_width`: the channels that RoPE may rotate; `normed_width`: those that qk_norm norms together.
    `projected_keys`: to how many keys it projects a sequence along the tokens, by products as large as those with the queries.
    `query_sources`: of how many linear functions of a token the queries are made; None if a projection `query` tells.

    `softmaxes`: how many softmax maps a head has. `causal`: whether models in which no token sees a later one may have it; if
    not, it has no cache.

    `options` names the ModelConfig fields that it reads but some other variants do not; those must leave them at their
    defaults. `refuses` gives, for switches that all other variants have, why this one cannot. `kernels` are the values of
    attention_kernel that it supports. `faults` yields faults of its own fields, with keys relative to the section.

    `maps` are the feature maps that distinguish its heads (gha.feature_map), empty if grouping heads has no meaning;
    `shares_values`: whether the values do not distinguish them in this configuration. `pruning` says how to prune heads, None
    if they cannot be pruned; `stock` how to export it to a stock architecture, None if there is none. `megatron`: whether it
    may be the self-attention of Megatron's own GPTModel (model/megatron/spec.py).
    """

    target: str
    projections: Callable[[ModelConfig], Projections]
    cached: Callable[[ModelConfig], Cached]
    embeddings: Count = lambda config: 0
    vectors: Callable[[ModelConfig], tuple[int, ...]] = lambda config: ()
    products: Callable[[ModelConfig], tuple[int, int]] = _head_columns
    rotary_width: Count = lambda config: config.head_width
    normed_width: Count = lambda config: config.head_width
    projected_keys: Count | None = None
    query_sources: Count | None = None
    softmaxes: int = 1
    causal: bool = True
    options: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    kernels: tuple[str, ...] = KERNELS
    faults: Rules = lambda config: ()
    maps: tuple[str, ...] = ()
    shares_values: Callable[[ModelConfig], bool] = lambda config: False
    pruning: Pruning | None = None
    stock: StockForm | None = None
    megatron: bool = False

    def query_freedom(self, config: ModelConfig) -> int:
        """How many independent linear functions of a hidden state the queries of all heads of a layer are made of."""
        if self.query_sources is not None:
            sources = self.query_sources(config)
        else:
            query = self.projections(config)["query"]
            sources = query.columns if query.inputs is None else query.groups * query.inputs
        return min(config.hidden_size, self.products(config)[0], sources)

    def of_kind(self, config: ModelConfig, *kinds: str) -> list[Projection]:
        """Its projections of these kinds."""
        return [projection for projection in self.projections(config).values() if projection.kind in kinds]
