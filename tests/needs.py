"""Fields that single attention variants need, for tests of all variants; their models have an even number of heads."""

from __future__ import annotations

from typing import Any

NEEDS: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mfa": {"query_rank": 8},
    "mhe_low_rank": {"query_rank": 8},
    "tpa": {"query_rank": 3, "key_rank": 2, "value_rank": 2},
    "mla": {"query_rank": 16, "latent_dim": 24, "rope_dim": 8},
    "gla": {"latent_dim": 24, "num_latents": 2, "rope_dim": 8},
    "gta": {"num_kv_heads": 2},
}


def needs(attention: str | tuple[str, ...]) -> dict[str, Any]:
    """The fields that a variant needs, or those of a pattern."""
    names = [attention] if isinstance(attention, str) else attention
    return {field: value for name in names for field, value in NEEDS.get(name, {}).items()}
