"""What an attention variant declares: all that others ask of it without its class. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from configs.schema import Fault, ModelConfig

Count = Callable[[ModelConfig], int]
Rules = Callable[[ModelConfig], Iterable[Fault]]
Kept = Sequence[Sequence[int]]  # of each layer the heads that stay, ascending
KERNELS = ("auto", "math", "sdpa")  # values of attention_kernel that need nothing of a variant
MAPS = ("value", "attention", "output")  # values of gha.feature_map


@dataclass(frozen=True)
class Pruning:
    """How a head leaves a layer; model/gha/pruning.py does it.

    Every head has rows of `query`, columns of `out.weight`, and a row of each parameter that the attention module itself holds.
    `key_value`: the number of blocks of rows in that projection, shared by neighbouring heads, and the rows of one;
    (0, 0) without it. `config`: what changes in the configuration beside num_heads; with `follows_vote` it depends on which
    heads stay, not only on how many.
    """

    key_value: Callable[[ModelConfig], tuple[int, int]] = lambda config: (0, 0)
    config: Callable[[ModelConfig, Kept], dict[str, object]] = lambda config, kept: {}
    follows_vote: bool = False


@dataclass(frozen=True)
class StockForm:
    """The variant as grouped-query attention with biases, which stock software has; model/huggingface/fold.py writes it.

    `fold` is the FoldedAttention as "module:Class", `kv_heads` its heads of keys and values. `refusal` says why a configuration
    has no such form, and what to change. `adds_biases`: it has biases even where the configuration has none.
    """

    fold: str
    kv_heads: Count
    refusal: Callable[[ModelConfig], str | None] = lambda config: None
    adds_biases: bool = False


@dataclass(frozen=True)
class Variant:
    """One attention variant: its class, what it costs, what it reads of the configuration, what can be done with it.

    `target` is the class as "module:Class". Three counts for one layer: `kv_heads` is the number of heads of head_dim that the
    cache keeps for keys, and the same for values; `projected` the output columns of all projections of the hidden state;
    `embeddings` the entries of all other parameters, the output projection apart.

    Two more say how it is sharded over tensor-parallel ranks: `shared` is the output columns of projections that all heads read
    (`Layers.shared`), `key_value_heads` the heads of a projection of K and V together (`Layers.key_value`).

    `options` names the ModelConfig fields that it reads and others may not; left at its default elsewhere. `kernels` are the
    values of attention_kernel that it knows. `faults` yields what is wrong with its own fields, keys relative to the section.

    `maps` are the feature maps that tell its heads apart (gha.feature_map), none where grouping heads has no meaning. `pruning`
    says how heads are pruned, None where they cannot be; `stock` how it is exported to stock software, None where it is not.
    `megatron`: whether it may be the self-attention of Megatron's own GPTModel (model/megatron/spec.py).
    """

    target: str
    kv_heads: Count
    projected: Count
    embeddings: Count = lambda config: 0
    shared: Count = lambda config: 0
    key_value_heads: Count = lambda config: 0
    options: tuple[str, ...] = ()
    kernels: tuple[str, ...] = KERNELS
    faults: Rules = lambda config: ()
    maps: tuple[str, ...] = ()
    pruning: Pruning | None = None
    stock: StockForm | None = None
    megatron: bool = False
