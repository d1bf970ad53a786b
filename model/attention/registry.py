"""Attention variants by name: the only place that tells them apart. docs/adding_attention.md adds one step by step.

Torch-free, so that configurations are checked and their costs counted without loading it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.schema import Fault, ModelConfig
from configs.targets import load_target
from model.attention.variant import KERNELS, MAPS, Count, Kept, Pruning, Rules, StockForm, Variant
from model.positions.registry import position_kind


def _own_queries(
    kv_heads: Count,
    maps: tuple[str, ...],
    pruning: Pruning,
    options: tuple[str, ...] = (),
    faults: Rules = lambda config: (),
) -> Variant:
    """A query projection for each head; `kv_heads` projections of K and V."""
    return Variant(
        target="model.attention.baselines:GroupedQueryAttention",
        kv_heads=kv_heads,
        projected=lambda config: (config.num_heads + 2 * kv_heads(config)) * config.head_width,
        key_value_heads=kv_heads,
        options=options,
        faults=faults,
        maps=maps,
        pruning=pruning,
        stock=StockForm("model.huggingface.fold:FoldedGroupedQuery", kv_heads),
    )


def _head_embeddings(target: str, fold: str, kernels: tuple[str, ...] = KERNELS, adds_biases: bool = False) -> Variant:
    """Shared projections of Q, K, V, one of each for a seed; heads differ by three embeddings, or two without e^K."""
    return Variant(
        target=target,
        kv_heads=_seeds,
        projected=_of_seeds,
        shared=_of_seeds,
        seeds=_seeds,
        embeddings=_embeddings,
        options=("num_seeds", "head_embeddings", "head_embedding_std", "embedding_position", "key_embedding"),
        kernels=kernels,
        faults=_embedding_faults,
        maps=MAPS,
        pruning=Pruning(
            lambda config: (config.num_seeds, 3 * config.head_width), _pruned_seeds, lambda config: config.num_seeds > 1
        ),
        stock=StockForm(fold, _embedded_kv_heads, _embedded_refusal, adds_biases),
        megatron=True,
    )


def _gqa_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.num_kv_heads is None:
        yield Fault("num_kv_heads", None, f"gqa needs it: a divisor of num_heads ({config.num_heads})")
    elif config.num_heads % config.num_kv_heads:
        yield Fault("num_kv_heads", config.num_kv_heads, f"must divide num_heads ({config.num_heads})")


def _pruned_gqa(config: ModelConfig, kept: Kept) -> dict[str, object]:
    """Prune key/value heads that no kept head reads; change to mha if the kept heads share the others unevenly."""
    read = _read_evenly(config, _gqa_heads(config), kept)
    if read is not None:
        return {"num_kv_heads": read}
    return {"num_kv_heads": None, "attention": "mha"}  # every head gets its own copy


def _pruned_seeds(config: ModelConfig, kept: Kept) -> dict[str, object]:
    """Prune seeds of which no head is kept; give each head a copy of its seed if the kept heads share them unevenly."""
    return {"num_seeds": _read_evenly(config, config.num_seeds, kept) or len(kept[0])}


def _read_evenly(config: ModelConfig, shared: int, kept: Kept) -> int | None:
    """How many of a layer's `shared` parts the kept heads read, if each part has equally many readers; else None."""
    sharing, sizes = config.num_heads // shared, set()
    for of_layer in kept:
        read = [head // sharing for head in of_layer]
        sizes |= {read.count(part) for part in read}
    return len(kept[0]) // sizes.pop() if len(sizes) == 1 else None


def _el_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.head_dim is not None and config.num_heads * config.head_dim != config.hidden_size:
        yield Fault(
            "head_dim",
            config.head_dim,
            f"el splits the hidden state into heads: num_heads * head_dim must be hidden_size ({config.hidden_size})",
        )


def _seed_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.num_heads % config.num_seeds:
        yield Fault("num_seeds", config.num_seeds, f"must divide num_heads ({config.num_heads})")


def _embedding_faults(config: ModelConfig) -> Iterator[Fault]:
    yield from _seed_faults(config)
    if not config.head_embeddings:
        if config.attention_kernel == "shared_scores":
            yield Fault("attention_kernel", "shared_scores", "without head_embeddings heads share all; take auto, math or sdpa")
        for name in ("embedding_position", "key_embedding", "head_embedding_std"):
            if getattr(config, name) != ModelConfig.model_fields[name].default:
                wanted = f"there are none with head_embeddings false; set it to {ModelConfig.default(name)}"
                yield Fault(name, getattr(config, name), wanted)
        return
    if config.embedding_position == "before":
        if not position_kind(config).rotates:
            yield Fault("embedding_position", "before", "used only by mhe_* with position rope; set it to after")
        if config.attention_kernel == "shared_scores":
            why = "with embedding_position before every head has its own scores; take auto, math or sdpa, or after"
            yield Fault("attention_kernel", "shared_scores", why)


def _embedded_kv_heads(config: ModelConfig) -> int:
    """Rotated embeddings of keys do not fold into queries: every head then has its own keys."""
    rotates = position_kind(config).rotates and config.key_embedding and config.head_embeddings
    return config.num_heads if rotates else config.num_seeds


def _embedded_refusal(config: ModelConfig) -> str | None:
    if not position_kind(config).rotates or config.embedding_position == "before" or not config.head_embeddings:
        return None
    return (
        "no stock model embeds heads after the rotation; train with model.embedding_position: before, and with "
        "model.key_embedding: false to have one head of keys and values"
    )


def _gqa_heads(config: ModelConfig) -> int:
    return config.num_kv_heads or config.num_heads


def _seeds(config: ModelConfig) -> int:
    return config.num_seeds


def _of_seeds(config: ModelConfig) -> int:
    """Output columns of Q, K and V of all seeds."""
    return 3 * config.num_seeds * config.head_width


def _embeddings(config: ModelConfig) -> int:
    kinds = 3 if config.key_embedding else 2
    return kinds * config.num_heads * config.head_width if config.head_embeddings else 0


def _all_heads(config: ModelConfig) -> int:
    return config.num_heads


def _half_the_heads(config: ModelConfig) -> int:
    """K and V are one tensor of num_heads heads, which the cache stores once: half of it as keys, half as values."""
    return (config.num_heads + 1) // 2


def _one_head(config: ModelConfig) -> int:
    return 1


_VARIANTS = {
    "mha": _own_queries(_all_heads, MAPS, Pruning(lambda config: (config.num_heads, 2 * config.head_width))),
    "gqa": _own_queries(
        _gqa_heads,
        MAPS[1:],
        Pruning(lambda config: (_gqa_heads(config), 2 * config.head_width), _pruned_gqa, lambda config: True),
        ("num_kv_heads",),
        _gqa_faults,
    ),
    "mqa": _own_queries(_one_head, MAPS[1:], Pruning(lambda config: (1, 2 * config.head_width))),
    "skv": Variant(
        target="model.attention.baselines:SharedKeyValueAttention",
        kv_heads=_half_the_heads,
        projected=lambda config: 2 * config.num_heads * config.head_width,
        maps=MAPS,
        pruning=Pruning(lambda config: (config.num_heads, config.head_width)),
        stock=StockForm("model.huggingface.fold:FoldedSharedKeyValue", _all_heads),
    ),
    "el": Variant(
        target="model.attention.baselines:ELAttention",
        kv_heads=_half_the_heads,
        projected=lambda config: config.num_heads * config.head_width,
        faults=_el_faults,
        stock=StockForm("model.huggingface.fold:FoldedHiddenState", _all_heads),
    ),
    "sha": Variant(
        target="model.attention.baselines:SingleHeadAttention",
        kv_heads=_seeds,
        projected=_of_seeds,
        shared=_of_seeds,
        seeds=_seeds,
        options=("num_seeds",),
        faults=_seed_faults,
        stock=StockForm("model.huggingface.fold:FoldedSingleHead", _seeds),
    ),
    "mhe_add": _head_embeddings(
        "model.attention.mhe:MHEAdd", "model.huggingface.fold:FoldedAdd", (*KERNELS, "shared_scores"), adds_biases=True
    ),
    "mhe_mul": _head_embeddings("model.attention.mhe:MHEMul", "model.huggingface.fold:FoldedMul"),
}


def attention_names() -> list[str]:
    """All values of `model.attention`."""
    return list(_VARIANTS)


def attention_variant(name: str) -> Variant:
    """The entry of `name`; KeyError where there is none."""
    return _VARIANTS[name]


def has_head_embeddings(config: ModelConfig) -> bool:
    """Whether the model's heads have embeddings (mhe_*)."""
    return config.head_embeddings and config.attention in _VARIANTS and "head_embeddings" in _VARIANTS[config.attention].options


def attention_class(name: str) -> type[Any]:
    """The module class of `name`, built as `Class(model_config, layers)`."""
    attention: type[Any] = load_target(_VARIANTS[name].target)
    return attention
