"""Formulas against built models, counted FLOPs, real caches and the paper's table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import ModelConfig
from model.accounting import flops_per_token, kv_cache_bytes_per_token, parameters
from model.attention.registry import attention_names, attention_variant
from model.transformer import DecoderLM


def model_config(attention: str, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "attention": attention,
        "hidden_size": 24 if attention == "el" else 20,
        "num_layers": 3,
        "num_heads": 6,
        "head_dim": 4,
        "vocab_size": 23,
        "position": "none",
        "num_kv_heads": 3 if attention == "gqa" else None,
    }
    return ModelConfig(**fields | changes)


def counted(config: ModelConfig) -> dict[str, int]:
    """Parameters of a real model by part, sorted by name."""
    with torch.device("meta"):
        model = DecoderLM(config)
    parts = dict.fromkeys(parameters(config), 0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            part = "norms"
        elif ".attention." in name:
            part = "attention"
        elif ".mlp." in name:
            part = "mlp"
        else:
            part = "output" if name.startswith("output") else "embeddings"
        parts[part] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", attention_names())
def test_parameters_of_every_option(name: str) -> None:
    options = itertools.product((True, False), ("gelu", "swiglu"), ("layernorm", "rmsnorm"), (True, False), ("learned", "rope"))
    for bias, activation, norm, tied, position in options:
        config = model_config(
            name,
            bias=bias,
            activation=activation,
            norm=norm,
            tie_embeddings=tied,
            position=position,
            max_position_embeddings=7 if position == "learned" else None,
        )
        assert parameters(config) == counted(config)


@pytest.mark.parametrize("name", ["mhe_add", "mhe_mul"])
@pytest.mark.parametrize(("position", "embedding_position"), [("none", "after"), ("rope", "before")])
def test_without_key_embedding_there_are_two_for_each_head(name: str, position: str, embedding_position: str) -> None:
    changes = {"position": position, "embedding_position": embedding_position}
    config, full = model_config(name, key_embedding=False, **changes), model_config(name, **changes)
    assert parameters(config) == counted(config)
    assert parameters(full)["attention"] - parameters(config)["attention"] == 3 * 6 * 4  # layers, heads, head_dim


@pytest.mark.parametrize(
    ("name", "changes", "millions", "exact"),
    [
        ("mha", {}, 28.31, 12 * 4 * 768 * 768),
        ("skv", {}, 21.23, 12 * 3 * 768 * 768),
        ("mqa", {}, 15.34, 12 * (2 * 768 * 768 + 2 * 768 * 64)),
        ("gqa", {"num_kv_heads": 4}, 18.87, 12 * (2 * 768 * 768 + 2 * 768 * 256)),
        ("el", {}, 14.16, 12 * 2 * 768 * 768),
        ("sha", {}, 8.85, 12 * (768 * 768 + 3 * 768 * 64)),
        ("mhe_add", {}, 8.88, 12 * (768 * 768 + 3 * 768 * 64 + 3 * 12 * 64)),
        ("mhe_mul", {}, 8.88, 12 * (768 * 768 + 3 * 768 * 64 + 3 * 12 * 64)),
    ],
)
def test_the_papers_table(name: str, changes: dict[str, Any], millions: float, exact: int) -> None:
    config = model_config(name, hidden_size=768, num_layers=12, num_heads=12, head_dim=64, bias=False, **changes)
    assert parameters(config)["attention"] == counted(config)["attention"] == exact
    assert round(exact / 1e6, 2) == millions


@pytest.mark.parametrize("name", attention_names())
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_are_the_matrix_products_of_a_training_step(name: str, activation: str) -> None:
    config, length = model_config(name, activation=activation), 8
    with torch.device("meta"):
        model, tokens_BS = DecoderLM(config), torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(tokens_BS, tokens_BS).sum().backward()
    # torch counts attention without its mask, so the pairs under the mask are counted here.
    counts = counter.get_flop_counts()["Global"].items()
    linear = sum(flops for operator, flops in counts if str(operator) in ("aten.mm", "aten.addmm"))
    pairs = sum(1 for t in range(length) for j in range(length) if j <= t)
    scores_and_values = 3 * config.num_layers * config.num_heads * pairs * 2 * (2 * config.head_width)
    assert flops_per_token(config, length) * length == linear + scores_and_values


@pytest.mark.parametrize("name", attention_names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cache_bytes_are_those_of_a_real_cache(name: str, dtype: torch.dtype) -> None:
    rotates_embeddings = "embedding_position" in attention_variant(name).options
    config = model_config(name, position="rope", embedding_position="before" if rotates_embeddings else "after")
    model = DecoderLM(config).to(dtype)
    cache = model.new_cache(batch_size=2, capacity=5)
    with torch.no_grad():
        model(torch.zeros(2, 5, dtype=torch.long), cache=cache)
    stored = sum(part.nbytes for layer in cache.layers for part in (layer.k_BKSD, layer.v_BKSD))
    assert kv_cache_bytes_per_token(config, dtype.itemsize) * 2 * 5 == stored


@pytest.mark.parametrize(
    ("name", "values"), [("mha", 2 * 24), ("gqa", 2 * 12), ("skv", 24), ("el", 24), ("mqa", 8), ("sha", 8), ("mhe_add", 8)]
)
def test_cached_values_of_a_token_and_layer(name: str, values: int) -> None:
    assert kv_cache_bytes_per_token(model_config(name), bytes_per_value=1) == 3 * values
