"""Parameter counts against built models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from configs.schema import ModelConfig
from model.attention.registry import attention_names
from model.costs.parameters import parameters
from model.decoder import DecoderLM
from tests.unit.model.costs.models import PATTERN, model_config


def counted(config: ModelConfig) -> dict[str, int]:
    """Parameters of a real model by part, sorted by name."""
    with torch.device("meta"):
        model = DecoderLM(config)
    parts = dict.fromkeys(parameters(config), 0)
    for name, parameter in model.named_parameters():
        if ".attention." in name:
            part = "attention"
        elif "norm" in name:
            part = "norms"
        elif ".mlp." in name:
            part = "mlp"
        else:
            part = "output" if name.startswith("output") else "embeddings"
        parts[part] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", [*attention_names(), PATTERN])
def test_parameters_of_every_option(name: str | tuple[str, ...]) -> None:
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
    ("name", "changes"),
    [
        ("gqa", {"qk_norm": True, "output_gate": "head"}),
        ("mhe_add", {"qk_norm": True, "bias": False}),
        ("mhe_mul", {"output_gate": "elementwise", "attention_sinks": True}),
    ],
)
def test_parameters_of_switches(name: str, changes: dict[str, Any]) -> None:
    config = model_config(name, **changes)
    assert parameters(config) == counted(config)
