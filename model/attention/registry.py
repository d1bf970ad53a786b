"""Attention variants by name: the only place that tells them apart. A new one is a line here, its class and its test.

Torch-free, so that configurations are checked and counted (model/accounting.py) without loading it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from configs.schema import Fault, ModelConfig, Section

Count = Callable[[ModelConfig], int]


@dataclass(frozen=True)
class Variant:
    """One attention variant.

    `target` is its "module:Class". `kv_heads` counts the key/value heads that exist in memory and in the cache, `projected` the
    output columns of all projections of the hidden state, `embeddings` the entries of its head embeddings.
    """

    target: str
    kv_heads: Count
    projected: Count
    embeddings: Count


def _own_queries(kv_heads: Count) -> Variant:
    """Own query projection of each head; `kv_heads` projections of K and V."""
    return Variant(
        target="model.attention.baselines:GroupedQueryAttention",
        kv_heads=kv_heads,
        projected=lambda config: (config.num_heads + 2 * kv_heads(config)) * config.head_width,
        embeddings=lambda config: 0,
    )


def _head_embeddings(target: str) -> Variant:
    """One shared projection each of Q, K, V; heads differ by three embeddings."""
    return Variant(
        target=target,
        kv_heads=lambda config: 1,
        projected=lambda config: 3 * config.head_width,
        embeddings=lambda config: 3 * config.num_heads * config.head_width,
    )


_VARIANTS = {
    "mha": _own_queries(lambda config: config.num_heads),
    "mqa": _own_queries(lambda config: 1),
    "gqa": _own_queries(lambda config: config.num_kv_heads or config.num_heads),
    "mhe_add": _head_embeddings("model.attention.mhe:MHEAdd"),
    "mhe_mul": _head_embeddings("model.attention.mhe:MHEMul"),
}


def attention_names() -> list[str]:
    """All values of `model.attention`."""
    return list(_VARIANTS)


def attention_variant(name: str) -> Variant:
    """The entry of `name`; KeyError where there is none."""
    return _VARIANTS[name]


def attention_class(name: str) -> type[Any]:
    """The module class of `name`, built as `Class(model_config, builders)`."""
    module, _, class_name = _VARIANTS[name].target.partition(":")
    attention: type[Any] = getattr(importlib.import_module(module), class_name)
    return attention


def attention_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """What the schema cannot know about `model.attention`."""
    model = sections.get("model")
    if not isinstance(model, ModelConfig) or model.attention in _VARIANTS:
        return []
    return [Fault("model.attention", model.attention, f"known: {', '.join(_VARIANTS)}")]
