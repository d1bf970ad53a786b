"""Fields that single attention variants need, for tests of all variants; their models have an even number of heads."""

from __future__ import annotations

from typing import Any

from model.attention.registry import attention_names, attention_variant

NEEDS: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mfa": {"query_rank": 8},
    "mhe_low_rank": {"query_rank": 8},
    "tpa": {"query_rank": 3, "key_rank": 2, "value_rank": 2},
    "mla": {"query_rank": 16, "latent_dim": 24, "rope_dim": 8},
    "gla": {"latent_dim": 24, "num_latents": 2, "rope_dim": 8},
    "gta": {"num_kv_heads": 2},
    "linformer": {"linformer_length": 3, "linformer_tokens": 16},
}


def needs(attention: str | tuple[str, ...]) -> dict[str, Any]:
    """The fields that a variant needs, or those of a pattern."""
    names = [attention] if isinstance(attention, str) else attention
    return {field: value for name in names for field, value in NEEDS.get(name, {}).items()}


def causal_names() -> list[str]:
    """The variants that a decoder may have; tests/unit/model/attention/test_linformer.py covers the other."""
    return [name for name in attention_names() if attention_variant(name).causal]
