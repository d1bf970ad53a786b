"""Usual values of fields that variants need, for comparisons that give none. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

from configs.schema import ModelConfig
from model.attention.faults import attention_faults
from model.attention.registry import attention_variant


def _query_rank(model: ModelConfig) -> int:
    """Factors of queries are few (arXiv 2501.06425); queries beside embeddings are narrow; others are half of the model."""
    if _reads(model, "key_rank"):
        return 6
    return model.head_width if _reads(model, "head_embeddings") else max(1, model.hidden_size // 2)


NEEDED: dict[str, Callable[[ModelConfig], int]] = {
    "num_kv_heads": lambda model: max(d for d in range(1, max(1, model.num_heads // 4) + 1) if model.num_heads % d == 0),
    "query_rank": _query_rank,
    "key_rank": lambda model: 2,
    "value_rank": lambda model: 2,
    "latent_dim": lambda model: 4 * model.head_width,  # as arXiv 2405.04434
    "num_latents": lambda model: 2,
    "rope_dim": lambda model: 2 * max(1, model.head_width // 4),
}


def needed(model: ModelConfig) -> dict[str, int]:
    """Usual values of fields that the model's variants need and that are not set."""
    lacking = [fault.key for fault in attention_faults(model) if fault.value is None]
    return {field: NEEDED[field](model) for field in lacking if field in NEEDED}


def _reads(model: ModelConfig, field: str) -> bool:
    return any(field in attention_variant(name).options for name in model.pattern)
