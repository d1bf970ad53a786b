"""What an attention variant declares, for code that must not import its class. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from configs.schema import Fault, ModelConfig

Count = Callable[[ModelConfig], int]
Rules = Callable[[ModelConfig], Iterable[Fault]]
Kept = Sequence[Sequence[int]]  # for each layer the heads to keep, ascending
KERNELS = ("auto", "math", "sdpa")  # values of attention_kernel that every variant supports
MAPS = ("value", "attention", "output")  # values of gha.feature_map


@dataclass(frozen=True)
class Pruning:
    """How heads are pruned from a layer; model/gha/pruning.py does it.

    Every head has rows of `query`, columns of `out.weight`, and a row of each parameter that the attention module itself
    holds. `blocks`: the number of blocks of rows in `key_value` or `qkv`, shared by neighbouring heads, and the rows of one
    block; (0, 0) without these. `config`: what changes in the configuration besides num_heads; `follows_vote`: whether this
    depends on which heads are kept, not only on how many.
    """

    blocks: Callable[[ModelConfig], tuple[int, int]] = lambda config: (0, 0)
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


@dataclass(frozen=True)
class Variant:
    """One attention variant: its class, its costs, the configuration fields it reads, and what it supports.

    `target` is the class as "module:Class". Three counts for one layer: `kv_heads` is the number of heads of head_dim that the
    cache keeps for keys, and the same for values; `projected` is the output columns of all projections of the hidden state;
    `embeddings` is the size of all other parameters except the output projection.

    Two more say how it is sharded over tensor-parallel ranks: `shared` is the output columns of projections that all heads read
    (`Layers.shared`), in `seeds` equal parts, `key_value_heads` the heads of a projection of K and V together
    (`Layers.key_value`).

    `options` names the ModelConfig fields that it reads but some other variants do not; those must leave them at their
    defaults. `kernels` are the values of attention_kernel that it supports. `faults` yields faults of its own fields, with keys
    relative to the section.

    `maps` are the feature maps that distinguish its heads (gha.feature_map), empty if grouping heads has no meaning. `pruning`
    says how to prune heads, None if they cannot be pruned; `stock` how to export it to a stock architecture, None if there is
    none. `megatron`: whether it may be the self-attention of Megatron's own GPTModel (model/megatron/spec.py).
    """

    target: str
    kv_heads: Count
    projected: Count
    embeddings: Count = lambda config: 0
    shared: Count = lambda config: 0
    seeds: Count = lambda config: 1
    key_value_heads: Count = lambda config: 0
    options: tuple[str, ...] = ()
    kernels: tuple[str, ...] = KERNELS
    faults: Rules = lambda config: ()
    maps: tuple[str, ...] = ()
    pruning: Pruning | None = None
    stock: StockForm | None = None
    megatron: bool = False
