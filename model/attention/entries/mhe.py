"""Entries of what shares one projection of Q, K and V, or one for each seed: SHA and MHE. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Fault, ModelConfig
from model.attention.entries.common import read_evenly
from model.attention.variant import KERNELS, MAPS, Kept, Projection, Pruning, StockForm, Variant, alike
from model.positions.registry import position_kind


def _head_embeddings(target: str, fold: str, kernels: tuple[str, ...] = KERNELS, adds_biases: bool = False) -> Variant:
    """Shared projections of Q, K, V, one of each for a seed; heads differ by three embeddings, or two without e^K."""
    return Variant(
        target=target,
        projections=_of_seeds,
        cached=alike(_seeds),
        query_sources=seed_queries,
        embeddings=_embeddings,
        options=("num_seeds", "head_embeddings", "head_embedding_std", "embedding_position", "key_embedding"),
        kernels=kernels,
        faults=_embedding_faults,
        maps=MAPS,
        pruning=Pruning(_pruned_seeds, lambda config: config.num_seeds > 1),
        stock=StockForm(fold, _embedded_kv_heads, _embedded_refusal, adds_biases),
        megatron=True,
    )


def _pruned_seeds(config: ModelConfig, kept: Kept) -> dict[str, object]:
    """Prune seeds of which no head is kept; give each head a copy of its seed if the kept heads share them unevenly."""
    return {"num_seeds": read_evenly(config, config.num_seeds, kept) or len(kept[0])}


def _seed_faults(config: ModelConfig) -> Iterator[Fault]:
    if config.num_heads % config.num_seeds:
        yield Fault("num_seeds", config.num_seeds, f"must divide num_heads ({config.num_heads})")


def _embedding_faults(config: ModelConfig) -> Iterator[Fault]:
    yield from _seed_faults(config)
    if not config.head_embeddings:
        if config.attention_kernel == "shared_scores":
            yield Fault("attention_kernel", "shared_scores", "without head_embeddings heads share all; take auto, math or sdpa")
        for name in ("embedding_position", "key_embedding", "head_embedding_std"):
            if config.changed(name):
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


def _seeds(config: ModelConfig) -> int:
    return config.num_seeds


def seed_queries(config: ModelConfig) -> int:
    """Columns of the queries of all seeds; embeddings of heads do not depend on the token."""
    return config.num_seeds * config.head_width


def _of_seeds(config: ModelConfig) -> dict[str, Projection]:
    """Q, K and V of each seed side by side, [q_1 k_1 v_1 q_2 k_2 v_2 …]."""
    return {"qkv": Projection("shared", config.num_seeds, 3 * config.head_width)}


def _embeddings(config: ModelConfig) -> int:
    kinds = 3 if config.key_embedding else 2
    return kinds * config.num_heads * config.head_width if config.head_embeddings else 0


ENTRIES = {
    "sha": Variant(
        target="model.attention.baselines:SingleHeadAttention",
        projections=_of_seeds,
        cached=alike(_seeds),
        query_sources=seed_queries,
        options=("num_seeds",),
        faults=_seed_faults,
        stock=StockForm("model.huggingface.fold:FoldedSingleHead", _seeds),
    ),
    "mhe_add": _head_embeddings(
        "model.attention.mhe:MHEAdd", "model.huggingface.fold:FoldedAdd", (*KERNELS, "shared_scores"), adds_biases=True
    ),
    "mhe_mul": _head_embeddings("model.attention.mhe:MHEMul", "model.huggingface.fold:FoldedMul"),
}
