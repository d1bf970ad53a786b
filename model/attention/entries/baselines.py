"""Entries of the baselines: MHA, GQA, MQA, SKV, EL-attention. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Fault, ModelConfig
from model.attention.entries.common import kv_head_faults, kv_heads, one_head, own_queries, read_evenly
from model.attention.variant import MAPS, Cached, Count, Kept, Projection, Pruning, Rules, StockForm, Variant, alike


def _grouped_query(
    kv_heads: Count,
    maps: tuple[str, ...],
    pruning: Pruning = Pruning(),  # noqa: B008 (frozen)
    options: tuple[str, ...] = (),
    faults: Rules = lambda config: (),
) -> Variant:
    """A query projection for each head; `kv_heads` projections of K and V."""
    return Variant(
        target="model.attention.baselines:GroupedQueryAttention",
        projections=lambda config: {
            "query": own_queries(config),
            "key_value": Projection("key_value", kv_heads(config), 2 * config.head_width),
        },
        cached=alike(kv_heads),
        options=options,
        faults=faults,
        maps=maps,
        pruning=pruning,
        stock=StockForm("model.huggingface.fold:FoldedGroupedQuery", kv_heads),
    )


def _pruned_gqa(config: ModelConfig, kept: Kept) -> dict[str, object]:
    """Prune key/value heads that no kept head reads; change to mha if the kept heads share the others unevenly."""
    read = read_evenly(config, kv_heads(config), kept)
    if read is not None:
        return {"num_kv_heads": read}
    return {"num_kv_heads": None, "attention": "mha"}  # every head gets its own copy


def _el_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.head_dim is not None and config.num_heads * config.head_dim != config.hidden_size:
        yield Fault(
            "head_dim",
            config.head_dim,
            f"el splits the hidden state into heads: num_heads * head_dim must be hidden_size ({config.hidden_size})",
        )


def _all_heads(config: ModelConfig) -> int:
    return config.num_heads


def _cached_once(config: ModelConfig) -> Cached:
    """K and V are one tensor of num_heads heads, which the cache stores once: half of it as keys, half as values."""
    half = (config.num_heads + 1) // 2
    return Cached(half, config.head_width, half, config.head_width)


def _channels(config: ModelConfig) -> Projection:
    return Projection("channels", config.num_heads, config.head_width)


ENTRIES = {
    "mha": _grouped_query(_all_heads, MAPS),
    "gqa": _grouped_query(
        kv_heads,
        MAPS[1:],
        Pruning(_pruned_gqa, lambda config: True),
        ("num_kv_heads",),
        kv_head_faults,
    ),
    "mqa": _grouped_query(one_head, MAPS[1:]),
    "skv": Variant(
        target="model.attention.baselines:SharedKeyValueAttention",
        projections=lambda config: {"query": own_queries(config), "key_value": own_queries(config)},
        cached=_cached_once,
        maps=MAPS,
        pruning=Pruning(),
        stock=StockForm("model.huggingface.fold:FoldedSharedKeyValue", _all_heads),
    ),
    "el": Variant(
        target="model.attention.baselines:ELAttention",
        projections=lambda config: {"query": own_queries(config), "key_value": _channels(config)},
        cached=_cached_once,
        faults=_el_faults,
        stock=StockForm("model.huggingface.fold:FoldedHiddenState", _all_heads),
    ),
}
