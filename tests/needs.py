"""Fields that single attention variants need, for tests of all variants; their models have an even number of heads."""

from __future__ import annotations

from typing import Any

NEEDS: dict[str, dict[str, Any]] = {"gqa": {"num_kv_heads": 2}}


def needs(attention: str) -> dict[str, Any]:
    """The fields that a variant needs."""
    return NEEDS.get(attention, {})
