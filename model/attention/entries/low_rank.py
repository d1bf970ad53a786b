"""Entries of what makes heads from factors of low rank: MFA, MHE with queries of low rank, TPA. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from configs.schema import Fault, ModelConfig
from model.attention.entries import mhe
from model.attention.entries.common import one_head
from model.attention.variant import MAPS, Cached, Projection, Projections, Pruning, Variant, alike


def _low_rank_queries(config: ModelConfig) -> Projections:
    """A latent of the token, which all heads read, and the query of each head from it; none at rank 0."""
    if not config.query_rank:
        return {}
    return {
        "query_down": Projection("shared", 1, config.query_rank),
        "query": Projection("expand", config.num_heads, config.head_width, config.query_rank),
    }


def _mfa_faults(config: ModelConfig) -> Iterator[Fault]:
    if not config.query_rank:
        yield Fault("query_rank", config.query_rank, "mfa needs it: above 0, such as half of hidden_size")


def _mhe_faults(config: ModelConfig) -> Iterator[Fault]:
    yield from _MHE_ADD.faults(config)
    if config.query_rank is None:
        yield Fault("query_rank", None, "mhe_low_rank needs it: a small number such as head_dim; 0 is mhe_add")
    elif config.query_rank > 0 and config.attention_kernel == "shared_scores":
        why = "with query_rank above 0 every head has its own scores; take auto, math or sdpa"
        yield Fault("attention_kernel", "shared_scores", why)


def _ranks(config: ModelConfig) -> tuple[int, int, int]:
    """Of queries, keys and values; 0 where one is missing."""
    return config.query_rank or 0, config.key_rank or 0, config.value_rank or 0


def _factors(config: ModelConfig) -> Projections:
    """Factors over heads, head by head, and factors over channels, which all heads read; keys before values."""
    query, key, value = _ranks(config)
    return {
        "query_head_factors": Projection("column", config.num_heads, query),
        "key_value_head_factors": Projection("column", config.num_heads, key + value),
        "query_channel_factors": Projection("shared", 1, query * config.head_width),
        "key_value_channel_factors": Projection("shared", 1, (key + value) * config.head_width),
    }


def _query_sources(config: ModelConfig) -> int:
    """Of products of two functions of the token there are as many near it as matrices of that rank have dimensions."""
    rank = min(config.query_rank or 0, config.num_heads, config.head_width)
    return rank * (config.num_heads + config.head_width - rank)


def _cached_factors(config: ModelConfig) -> Cached:
    """For each rank, the factors over heads and over channels side by side."""
    _, key, value = _ranks(config)
    return Cached(key, config.num_heads + config.head_width, value, config.num_heads + config.head_width)


def _tpa_faults(config: ModelConfig) -> Iterator[Fault]:
    for name, rank, usual in zip(("query_rank", "key_rank", "value_rank"), _ranks(config), (6, 2, 2), strict=True):
        if not rank:
            yield Fault(name, getattr(config, name), f"tpa needs it: above 0, such as {usual}")


_MHE_ADD = mhe.ENTRIES["mhe_add"]
assert _MHE_ADD.stock is not None
_MHE_STOCK = replace(_MHE_ADD.stock, fold="model.huggingface.fold:FoldedLowRank")

ENTRIES = {
    "mfa": Variant(
        target="model.attention.low_rank:MultiMatrixAttention",
        projections=lambda config: {
            **_low_rank_queries(config),
            "key_value": Projection("key_value", 1, 2 * config.head_width),
        },
        cached=alike(one_head),
        vectors=lambda config: (config.query_rank or 0,),
        options=("query_rank",),
        faults=_mfa_faults,
        maps=MAPS[1:],
        pruning=Pruning(),
    ),
    "mhe_low_rank": replace(
        _MHE_ADD,
        target="model.attention.low_rank:MHELowRank",
        projections=lambda config: {**_MHE_ADD.projections(config), **_low_rank_queries(config)},
        query_sources=lambda config: mhe.seed_queries(config) + (config.query_rank or 0),
        options=(*_MHE_ADD.options, "query_rank"),
        faults=_mhe_faults,
        stock=_MHE_STOCK,
        megatron=False,
    ),
    "tpa": Variant(
        target="model.attention.low_rank:TensorProductAttention",
        projections=_factors,
        cached=_cached_factors,
        query_sources=_query_sources,
        options=("query_rank", "key_rank", "value_rank"),
        refuses={"qk_norm": "the cache keeps factors of keys, and a norm of their products is none of the factors"},
        faults=_tpa_faults,
        maps=MAPS,
        pruning=Pruning(),
    ),
}
