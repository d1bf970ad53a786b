"""Attention variants by name: the only place that tells them apart. docs/adding_attention.md adds one step by step.

Torch-free, so that configurations are checked and counted (model/costs) without loading it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.schema import DataConfig, Fault, GHAConfig, ModelConfig, ParallelConfig, Section

Count = Callable[[ModelConfig], int]
Rules = Callable[[ModelConfig], Iterable[Fault]]
KERNELS = ("auto", "math", "sdpa")  # values of attention_kernel that need nothing of a variant
MAPS = ("value", "attention", "output")  # values of gha.feature_map


@dataclass(frozen=True)
class Variant:
    """One attention variant: its class, what it costs, what it reads of the configuration.

    `target` is the class as "module:Class". Three counts for one layer: `kv_heads` is the number of heads of head_dim that the
    cache keeps for keys, and the same for values; `projected` the output columns of all projections of the hidden state;
    `embeddings` the entries of all other parameters, the output projection apart.

    More say how it splits over tensor-parallel ranks: `shared` is the output columns of projections that all heads read
    (`Layers.shared`), `key_value_heads` the heads of a projection of K and V together (`Layers.key_value`).

    `maps` are the feature maps that tell its heads apart (gha.feature_map), none where grouping heads has no meaning.

    `options` names the ModelConfig fields that it reads and others may not; left at its default elsewhere. `kernels` are the
    values of attention_kernel that it knows. `faults` yields what is wrong with its own fields, keys relative to the section.
    """

    target: str
    kv_heads: Count
    projected: Count
    embeddings: Count = lambda config: 0
    shared: Count = lambda config: 0
    key_value_heads: Count = lambda config: 0
    maps: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    kernels: tuple[str, ...] = KERNELS
    faults: Rules = lambda config: ()


def _own_queries(
    kv_heads: Count, maps: tuple[str, ...], options: tuple[str, ...] = (), faults: Rules = lambda config: ()
) -> Variant:
    """Own query projection of each head; `kv_heads` projections of K and V."""
    return Variant(
        target="model.attention.baselines:GroupedQueryAttention",
        kv_heads=kv_heads,
        projected=lambda config: (config.num_heads + 2 * kv_heads(config)) * config.head_width,
        key_value_heads=kv_heads,
        maps=maps,
        options=options,
        faults=faults,
    )


def _head_embeddings(target: str, kernels: tuple[str, ...] = KERNELS) -> Variant:
    """One shared projection each of Q, K, V; heads differ by three embeddings, or two without that of K."""
    return Variant(
        target=target,
        kv_heads=lambda config: 1,
        projected=lambda config: 3 * config.head_width,
        shared=lambda config: 3 * config.head_width,
        embeddings=lambda config: (3 if config.key_embedding else 2) * config.num_heads * config.head_width,
        maps=MAPS,
        options=("embedding_position", "key_embedding"),
        kernels=kernels,
        faults=_embedding_faults,
    )


def _gqa_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.num_kv_heads is None:
        yield Fault("num_kv_heads", None, f"gqa needs it: a divisor of num_heads ({config.num_heads})")
    elif config.num_heads % config.num_kv_heads:
        yield Fault("num_kv_heads", config.num_kv_heads, f"must divide num_heads ({config.num_heads})")


def _el_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.head_dim is not None and config.num_heads * config.head_dim != config.hidden_size:
        yield Fault(
            "head_dim",
            config.head_dim,
            f"el splits the hidden state into heads: num_heads * head_dim must be hidden_size ({config.hidden_size})",
        )


def _embedding_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.embedding_position == "before":
        if config.position != "rope":
            yield Fault(
                "embedding_position", "before", "only mhe_* with position rope has a rotation to stand before; leave it out"
            )
        if config.attention_kernel == "shared_scores":
            why = "with embedding_position before every head has scores of its own; take auto, math or sdpa, or after"
            yield Fault("attention_kernel", "shared_scores", why)


def _half_the_heads(config: ModelConfig) -> int:
    """K and V are one tensor of num_heads heads, which the cache keeps once: half of it as keys, half as values."""
    return (config.num_heads + 1) // 2


_VARIANTS = {
    "mha": _own_queries(lambda config: config.num_heads, MAPS),
    "gqa": _own_queries(lambda config: config.num_kv_heads or config.num_heads, MAPS[1:], ("num_kv_heads",), _gqa_faults),
    "mqa": _own_queries(lambda config: 1, MAPS[1:]),
    "skv": Variant(
        target="model.attention.baselines:SharedKeyValueAttention",
        kv_heads=_half_the_heads,
        projected=lambda config: 2 * config.num_heads * config.head_width,
        maps=MAPS,
    ),
    "el": Variant(
        target="model.attention.baselines:ELAttention",
        kv_heads=_half_the_heads,
        projected=lambda config: config.num_heads * config.head_width,
        faults=_el_faults,
    ),
    "sha": Variant(
        target="model.attention.baselines:SingleHeadAttention",
        kv_heads=lambda config: 1,
        projected=lambda config: 3 * config.head_width,
        shared=lambda config: 3 * config.head_width,
    ),
    "mhe_add": _head_embeddings("model.attention.mhe:MHEAdd", (*KERNELS, "shared_scores")),
    "mhe_mul": _head_embeddings("model.attention.mhe:MHEMul"),
}


def attention_names() -> list[str]:
    """All values of `model.attention`."""
    return list(_VARIANTS)


def attention_variant(name: str) -> Variant:
    """The entry of `name`; KeyError where there is none."""
    return _VARIANTS[name]


def attention_class(name: str) -> type[Any]:
    """The module class of `name`, built as `Class(model_config, layers)`."""
    module, _, class_name = _VARIANTS[name].target.partition(":")
    attention: type[Any] = getattr(importlib.import_module(module), class_name)
    return attention


def attention_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """What the schema cannot know about `model.attention` and the fields that only some variants read."""
    model = sections.get("model")
    if not isinstance(model, ModelConfig):
        return []
    if model.attention not in _VARIANTS:
        return [Fault("model.attention", model.attention, f"known: {', '.join(_VARIANTS)}")]
    variant = _VARIANTS[model.attention]
    faults = [*_unread(model, variant), *variant.faults(model)]
    return [Fault(f"model.{fault.key}", fault.value, fault.allowed) for fault in faults]


def gha_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """What is wrong with the `gha` section for this model."""
    model, gha, parallel = sections.get("model"), sections.get("gha"), sections.get("parallel")
    if not isinstance(model, ModelConfig) or not isinstance(gha, GHAConfig) or model.attention not in _VARIANTS:
        return []
    if gha.stage == "off":
        return []
    maps = _VARIANTS[model.attention].maps
    if not maps:
        grouped = ", ".join(name for name, other in _VARIANTS.items() if other.maps)
        return [
            Fault(
                "gha.stage", gha.stage, f"the heads of {model.attention} cannot be told apart or cut; only those of {grouped}"
            )
        ]
    faults = []
    if gha.feature_map not in maps:
        wanted = f"the heads of {model.attention} share their values; take {' or '.join(maps)}"
        faults.append(Fault("gha.feature_map", gha.feature_map, wanted))
    if gha.stage != "constrain" and model.position == "alibi":
        faults.append(
            Fault("gha.stage", gha.stage, "heads of position alibi have a slope by number and cannot be cut; constrain only")
        )
    tensor = parallel.tensor if isinstance(parallel, ParallelConfig) else 1
    if gha.stage == "schedule" and model.attention == "gqa" and tensor > 1:
        wanted = "which key/value heads of gqa are left is known after the vote; with parallel.tensor take constrain, then vote"
        faults.append(Fault("gha.stage", gha.stage, wanted))
    if gha.stage == "schedule" and gha.heads_per_group * (gha.groups or 1) % tensor:
        times = "" if gha.groups is None else f"times gha.groups ({gha.groups}) "
        wanted = f"{times}must be a multiple of parallel.tensor ({tensor}): ranks share the heads that stay"
        faults.append(Fault("gha.heads_per_group", gha.heads_per_group, wanted))
    return faults


def tensor_sizes(model: ModelConfig) -> list[int]:
    """How many tensor-parallel ranks the model can be split over, smallest first: every rank gets as much as the others.

    t divides the query heads and the MLP's width; key/value heads divide by t, or t by them, with a weight of t equal parts; a
    projection that all heads read has t equal parts.
    """
    variant, heads = attention_variant(model.attention), model.num_heads
    key_value_heads, shared = variant.key_value_heads(model), variant.shared(model)

    def splits(t: int) -> bool:
        few = key_value_heads % t != 0
        if few and (t % key_value_heads or 2 * key_value_heads * model.head_width % t):
            return False
        return heads % t == 0 and model.ffn_width % t == 0 and shared % t == 0

    return [t for t in range(1, heads + 1) if splits(t)]


def tensor_faults(sections: Mapping[str, Section]) -> list[Fault]:
    """What is wrong with the `parallel` section for this model and data."""
    model, parallel, data = (sections.get(name) for name in ("model", "parallel", "data"))
    if not isinstance(model, ModelConfig) or not isinstance(parallel, ParallelConfig) or model.attention not in _VARIANTS:
        return []
    faults = []
    if parallel.mhe_gather != "auto" and not _VARIANTS[model.attention].shared(model):
        readers = [name for name, other in _VARIANTS.items() if other.shared(model)]
        faults.append(Fault("parallel.mhe_gather", parallel.mhe_gather, _only(readers, model.attention)))
    sizes = tensor_sizes(model) if parallel.tensor > 1 else [1]
    if parallel.tensor not in sizes:
        wanted = f"must divide {_split_counts(model)}: {', '.join(map(str, sizes))}"
        faults.append(Fault("parallel.tensor", parallel.tensor, wanted))
    if parallel.sequence and isinstance(data, DataConfig) and data.sequence_length % parallel.tensor:
        wanted = f"must be a multiple of parallel.tensor ({parallel.tensor}) with parallel.sequence"
        faults.append(Fault("data.sequence_length", data.sequence_length, wanted))
    return faults


def _split_counts(model: ModelConfig) -> str:
    """What a tensor-parallel size must divide, as text."""
    variant, counts = attention_variant(model.attention), [f"num_heads ({model.num_heads})", f"MLP width ({model.ffn_width})"]
    key_value_heads, shared = variant.key_value_heads(model), variant.shared(model)
    if shared:
        counts.append(f"{shared // model.head_width} * head_dim ({shared})")
    if key_value_heads == 1:
        counts.append(f"2 * head_dim ({2 * model.head_width})")
    *first, last = counts
    text = f"{', '.join(first)} and {last}"
    if 1 < key_value_heads < model.num_heads:
        stored = f"{2 * key_value_heads} * head_dim ({2 * key_value_heads * model.head_width})"
        text += f", and {key_value_heads} key/value heads or, as a multiple of that, {stored}"
    return text


def _unread(model: ModelConfig, variant: Variant) -> Iterator[Fault]:
    """Fields and kernels given to a variant that has no use for them."""
    optional = dict.fromkeys(field for other in _VARIANTS.values() for field in other.options)
    for field in optional:
        value = getattr(model, field)
        if field not in variant.options and value != ModelConfig.model_fields[field].default:
            readers = [name for name, other in _VARIANTS.items() if field in other.options]
            yield Fault(field, value, _only(readers, model.attention))
    if model.attention_kernel not in variant.kernels:
        readers = [name for name, other in _VARIANTS.items() if model.attention_kernel in other.kernels]
        known = f"{_only(readers, model.attention)}, or take {', '.join(variant.kernels)}"
        yield Fault("attention_kernel", model.attention_kernel, known)


def _only(names: list[str], other: str) -> str:
    return f"only {', '.join(names)} {'has' if len(names) == 1 else 'have'} it, not {other}; leave it out"
