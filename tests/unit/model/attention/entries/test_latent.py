"""What is wrong with the fields of mla, gla and gta."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import ModelConfig
from model.faults import model_faults

MLA: dict[str, Any] = {"attention": "mla", "latent_dim": 12}
GLA: dict[str, Any] = {"attention": "gla", "latent_dim": 12}
ROPE: dict[str, Any] = {"position": "rope"}


def config_of(fields: dict[str, Any]) -> ModelConfig:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "position": "none"}
    return ModelConfig(**sizes | fields)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"attention": "gta"}, "num_kv_heads = null: gta needs it: a divisor of num_heads (8)"),
        ({"attention": "gta", "num_kv_heads": 3}, "num_kv_heads = 3: must divide num_heads (8)"),
        (
            {"attention": "gta", "num_kv_heads": 2, "head_dim": 5},
            "head_dim = 5: gta needs a multiple of 2 (half of a key is that of its value)",
        ),
        (
            {"attention": "gta", "num_kv_heads": 2, "head_dim": 6} | ROPE,
            "head_dim = 6: gta needs a multiple of 4 (half of a key is that of its value, the other half rotates in pairs)",
        ),
        (
            {"attention": "mla"},
            "latent_dim = null: mla needs it: what the cache keeps of keys and values, such as 4 * head_dim",
        ),
        (
            MLA | {"query_rank": 0},
            "query_rank = 0: mla has no queries of rank 0; null projects them from the hidden state",
        ),
        (MLA | ROPE, "rope_dim = null: mla needs it with position rope: an even number of channels"),
        (MLA | ROPE | {"rope_dim": 3}, "rope_dim = 3: must be even with position rope (channels rotate in pairs)"),
        (
            MLA | {"qk_norm": True},
            "qk_norm = true: mla: its latents are normed, and when it generates heads have no keys; set it to false",
        ),
        (MLA | {"num_latents": 2}, "num_latents = 2: only gla has it, not mla; set it to null"),
        (GLA, "num_latents = null: gla needs it: a divisor of num_heads (8) and of latent_dim"),
        (GLA | {"num_latents": 3}, "num_latents = 3: must divide num_heads (8)"),
        (GLA | {"num_latents": 8}, "num_latents = 8: must divide latent_dim (12)"),
        ({"attention": "mha", "rope_dim": 2}, "rope_dim = 2: only mla, gla have it, not mha; set it to null"),
    ],
)
def test_faults(fields: dict[str, Any], fault: str) -> None:
    config = config_of(fields)
    assert [str(found) for found in model_faults({"model": config})] == [f"model.{fault}"]


@pytest.mark.parametrize("changes", [{}, {"rope_dim": 3}, {"query_rank": 5}, ROPE | {"rope_dim": 4}])
def test_without_rope_the_shared_key_may_be_missing_or_of_any_width(changes: dict[str, Any]) -> None:
    assert not model_faults({"model": config_of(MLA | changes)})
