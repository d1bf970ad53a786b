"""Attention variants by name: the only place that tells them apart. docs/adding_attention.md adds one step by step.

Torch-free, so that configurations are checked and their costs counted without loading it. model/attention/entries has the
entries, a file for each family.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

from configs.schema import ModelConfig
from configs.targets import load_target
from model.attention.entries import baselines, differential, latent, linformer, low_rank, mhe
from model.attention.variant import Projection, Variant

OUTPUT_GATE = "output_gate"  # the name of the gate's projection in an attention module
_VARIANTS: dict[str, Variant] = {
    **baselines.ENTRIES,
    **mhe.ENTRIES,
    **differential.ENTRIES,
    **latent.ENTRIES,
    **low_rank.ENTRIES,
    **linformer.ENTRIES,
}


@lru_cache
def layer_configs(config: ModelConfig) -> tuple[ModelConfig, ...]:
    """The configuration of each layer: its one variant, and what holds for this layer of what not all layers have.

    In a pattern, fields that its variant does not read have their defaults.
    """
    pattern = config.pattern
    kinds = {name: _of_variant(config, name) if len(pattern) > 1 else config for name in dict.fromkeys(pattern)}
    if config.no_position_every is None and config.full_attention_every is None:
        return tuple(kinds[pattern[number % len(pattern)]] for number in range(config.num_layers))
    return tuple(_numbered(kinds[pattern[number % len(pattern)]], number + 1) for number in range(config.num_layers))


def _numbered(config: ModelConfig, number: int) -> ModelConfig:
    """The configuration of a layer, counted from 1, without the fields that say which layers differ."""
    changes: dict[str, object] = {"no_position_every": None, "full_attention_every": None}
    if config.no_position_every is not None and number % config.no_position_every == 0:
        changes |= {"position": "none", "embedding_position": "after"}
    if config.full_attention_every is not None and number % config.full_attention_every == 0:
        changes["sliding_window"] = None
    return config.model_copy(update=changes)


def _of_variant(config: ModelConfig, name: str) -> ModelConfig:
    variant = _VARIANTS[name]
    unread = {field for other in _VARIANTS.values() for field in other.options} - set(variant.options)
    if config.attention_kernel not in variant.kernels:
        unread.add("attention_kernel")
    defaults = {field: ModelConfig.model_fields[field].default for field in unread}
    return config.model_copy(update={"attention": name, **defaults})


def layer_kinds(config: ModelConfig) -> dict[ModelConfig, int]:
    """The different configurations of layers, in order of first appearance, and how many layers have each."""
    return dict(Counter(layer_configs(config)))


def variant_of(layer: ModelConfig) -> Variant:
    """The entry of a layer's variant."""
    assert isinstance(layer.attention, str), "the configuration of a layer has one variant (layer_configs)"
    return _VARIANTS[layer.attention]


def projections_of(layer: ModelConfig) -> dict[str, Projection]:
    """A layer's linear layers by name, except the output projection: its variant's, and those that any variant may have."""
    projections = dict(variant_of(layer).projections(layer))
    if layer.output_gate is not None:
        width = layer.head_width if layer.output_gate == "elementwise" else 1
        projections[OUTPUT_GATE] = Projection("column", layer.num_heads, width)
    return projections


def model_projections(config: ModelConfig) -> list[tuple[str, Projection]]:
    """Those of each kind of layer, with their names."""
    return [named for layer in layer_kinds(config) for named in projections_of(layer).items()]


def rotary_widths(config: ModelConfig) -> tuple[int, ...]:
    """How wide is what the model's layers rotate."""
    return tuple(dict.fromkeys(variant_of(layer).rotary_width(layer) for layer in layer_kinds(config)))


def replicated_vectors(layer: ModelConfig) -> tuple[int, ...]:
    """The sizes of a layer's parameters that all heads read and each rank has a part of the gradient of, call by call."""
    normed = variant_of(layer).normed_width(layer)
    return (normed, normed) * layer.qk_norm + variant_of(layer).vectors(layer)


def attention_names() -> list[str]:
    """All values of `model.attention`."""
    return list(_VARIANTS)


def attention_variant(name: str) -> Variant:
    """The entry of `name`; KeyError where there is none."""
    return _VARIANTS[name]


def has_head_embeddings(config: ModelConfig) -> bool:
    """Whether heads of the model have embeddings (mhe_*)."""
    known = [_VARIANTS[name] for name in config.pattern if name in _VARIANTS]
    return config.head_embeddings and any("head_embeddings" in variant.options for variant in known)


def is_head_embedding(name: str) -> bool:
    """Whether a parameter, by its name in the model, is an embedding of heads (mhe_*)."""
    *_, owner, kind = ("", *name.split("."))
    return owner == "attention" and kind.endswith("_embedding")


def is_attention_output(name: str) -> bool:
    """Whether a parameter, by its name in the model, is the weight of an attention layer's output projection."""
    return name.endswith("attention.out.weight")


def attention_class(layer: ModelConfig) -> type[Any]:
    """The module class of a layer's variant, built as `Class(layer, layers, number)`."""
    attention: type[Any] = load_target(variant_of(layer).target)
    return attention
