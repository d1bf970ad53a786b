"""Entries of the Differential Transformer, V1 and V2: heads that subtract one softmax map from another. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Fault, ModelConfig
from model.attention.entries.common import kv_heads, own_queries, read_evenly
from model.attention.variant import Kept, Projection, Pruning, Variant, alike
from model.positions.registry import position_kind


def _half(config: ModelConfig) -> int:
    """The channels of one of a head's two queries or keys."""
    return config.head_width // 2


def _faults(config: ModelConfig) -> Iterator[Fault]:
    if config.num_kv_heads is not None and config.num_heads % config.num_kv_heads:
        wanted = f"must divide num_heads ({config.num_heads}); null: keys and values for each head"
        yield Fault("num_kv_heads", config.num_kv_heads, wanted)


def _halves_faults(config: ModelConfig) -> Iterator[Fault]:
    yield from _faults(config)
    multiple = 4 if position_kind(config).rotates else 2
    if config.head_width % multiple and (config.head_dim or config.hidden_size % config.num_heads == 0):
        turning = f", of which position {config.position} rotates channels in pairs" if multiple == 4 else ""
        wanted = f"diff has two queries and two keys of head_dim / 2 in a head{turning}: must be a multiple of {multiple}"
        yield Fault("head_dim", config.head_width, wanted)


def _key_value(config: ModelConfig) -> Projection:
    return Projection("key_value", kv_heads(config), 2 * config.head_width)


def _shares_values(config: ModelConfig) -> bool:
    return kv_heads(config) < config.num_heads


def _pruned(config: ModelConfig, kept: Kept) -> dict[str, object]:
    """Prune key/value heads that no kept head reads; give each head a copy of its own if the kept heads share them unevenly."""
    if config.num_kv_heads is None:
        return {}
    return {"num_kv_heads": read_evenly(config, config.num_kv_heads, kept)}


ENTRIES = {
    "diff": Variant(
        target="model.attention.differential:DifferentialAttention",
        projections=lambda config: {"query": own_queries(config), "key_value": _key_value(config)},
        cached=alike(kv_heads),
        softmaxes=2,
        products=lambda config: (config.num_heads * config.head_width, 2 * config.num_heads * config.head_width),
        # The four vectors of λ in one call, and the norm of the heads.
        vectors=lambda config: (4 * _half(config), config.head_width),
        rotary_width=_half,
        normed_width=_half,
        options=("num_kv_heads",),
        refuses={"rope_fraction": "each half of a head is rotated by itself"},
        faults=_halves_faults,
        maps=("value", "output"),  # a difference of two softmax maps has no weights that are compared
        shares_values=_shares_values,
        pruning=Pruning(_pruned, _shares_values),
    ),
    "diff_v2": Variant(
        target="model.attention.differential:DifferentialAttentionV2",
        projections=lambda config: {
            "query": Projection("column", 2 * config.num_heads, config.head_width),
            "lambdas": Projection("column", config.num_heads, 1),
            "key_value": _key_value(config),
        },
        cached=alike(kv_heads),
        softmaxes=2,
        products=lambda config: (2 * config.num_heads * config.head_width, 2 * config.num_heads * config.head_width),
        options=("num_kv_heads",),
        faults=_faults,
        maps=("value", "output"),
        shares_values=_shares_values,
        pruning=Pruning(_pruned, _shares_values),
    ),
}
