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
    """One shared projection each of Q, K, V; heads differ by three embeddings, or two without e^K."""
    return Variant(
        target=target,
        kv_heads=lambda config: 1,
        projected=lambda config: 3 * config.head_width,
        shared=lambda config: 3 * config.head_width,
        embeddings=lambda config: (3 if config.key_embedding else 2) * config.num_heads * config.head_width,
        options=("embedding_position", "key_embedding"),
        kernels=kernels,
        faults=_embedding_faults,
        maps=MAPS,
        pruning=Pruning(),
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
    sharing, sizes = config.num_heads // _gqa_heads(config), set()
    for of_layer in kept:
        read = [head // sharing for head in of_layer]
        sizes |= {read.count(kv_head) for kv_head in read}
    if len(sizes) == 1:
        return {"num_kv_heads": len(kept[0]) // sizes.pop()}
    return {"num_kv_heads": None, "attention": "mha"}  # every head gets its own copy


def _el_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.head_dim is not None and config.num_heads * config.head_dim != config.hidden_size:
        yield Fault(
            "head_dim",
            config.head_dim,
            f"el splits the hidden state into heads: num_heads * head_dim must be hidden_size ({config.hidden_size})",
        )


def _embedding_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.embedding_position == "before":
        if not position_kind(config).rotates:
            yield Fault("embedding_position", "before", "used only by mhe_* with position rope; set it to after")
        if config.attention_kernel == "shared_scores":
            why = "with embedding_position before every head has its own scores; take auto, math or sdpa, or after"
            yield Fault("attention_kernel", "shared_scores", why)


def _embedded_kv_heads(config: ModelConfig) -> int:
    """Rotated embeddings of keys do not fold into queries: every head then has its own keys."""
    return config.num_heads if position_kind(config).rotates and config.key_embedding else 1


def _embedded_refusal(config: ModelConfig) -> str | None:
    if not position_kind(config).rotates or config.embedding_position == "before":
        return None
    return (
        "no stock model embeds heads after the rotation; train with model.embedding_position: before, and with "
        "model.key_embedding: false to have one head of keys and values"
    )


def _gqa_heads(config: ModelConfig) -> int:
    return config.num_kv_heads or config.num_heads


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
        Pruning(lambda config: (_gqa_heads(config), 2 * config.head_width), _pruned_gqa, follows_vote=True),
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
        kv_heads=_one_head,
        projected=lambda config: 3 * config.head_width,
        shared=lambda config: 3 * config.head_width,
        stock=StockForm("model.huggingface.fold:FoldedSingleHead", _one_head),
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


def attention_class(name: str) -> type[Any]:
    """The module class of `name`, built as `Class(model_config, layers)`."""
    attention: type[Any] = load_target(_VARIANTS[name].target)
    return attention
