"""Small models that the formulas are compared with."""

from __future__ import annotations

from typing import Any

from configs.schema import ModelConfig
from tests.needs import needs

PATTERN = ("mhe_add", "gqa")  # for models of three layers


def model_config(attention: str | tuple[str, ...], **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "attention": attention,
        "hidden_size": 24 if attention == "el" else 20,
        "num_layers": 3,
        "num_heads": 6,
        "head_dim": 4,
        "vocab_size": 23,
        "position": "none",
    }
    return ModelConfig(**fields | needs(attention) | changes)
