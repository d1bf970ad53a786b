"""What the entries of positions declare, against the modules of models."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from configs.schema import ModelConfig
from model.decoder import DecoderLM
from model.huggingface.configuration_manyheads import CHOICES
from model.positions.positions import make_positions
from model.positions.registry import position_faults, position_kind, position_names


def config_of(position: str, **fields: object) -> ModelConfig:
    longest = 9 if position == "learned" else None
    base = {"hidden_size": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 5, "max_position_embeddings": longest}
    return ModelConfig.model_validate(base | {"position": position} | fields)


def test_the_schema_and_exported_code_know_the_same_names() -> None:
    assert list(get_args(ModelConfig.model_fields["position"].annotation)) == position_names()
    assert sorted(CHOICES["position"]) == sorted(position_names())


@pytest.mark.parametrize("name", position_names())
def test_entries_say_where_positions_enter(name: str) -> None:
    config = config_of(name)
    kind, positions = position_kind(config), make_positions(config, 7, 0, torch.float32, torch.device("cpu"))
    table = [parameter for parameter, _ in DecoderLM(config).named_parameters() if parameter.startswith("position")]
    assert (positions.rotary is not None) == kind.rotates == (name == "rope")
    assert (positions.slopes_N is not None) == kind.biases_scores == (name == "alibi")
    assert bool(table) == kind.has_table == (name == "learned")
    assert kind.prunable == (positions.slopes_N is None)
    assert not list(position_faults(config))


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (config_of("rope", head_dim=5), "head_dim = 5: must be even with position rope (channels rotate in pairs)"),
        (
            config_of("rope", rope_fraction=0.5),
            "rope_fraction = 0.5: must leave an even number of the 6 channels of a head, at least 2, for the rotation",
        ),
        (config_of("alibi", rope_fraction=0.5), "rope_fraction = 0.5: only position rope has it; set it to 1.0"),
        (
            config_of("learned", no_position_every=2),
            "no_position_every = 2: position learned does not enter single layers; set it to null, or take rope or alibi",
        ),
        (config_of("learned", rope_theta=50.0), "rope_theta = 50.0: only position rope has it; set it to 10000.0"),
        (
            config_of("none", max_position_embeddings=9),
            "max_position_embeddings = 9: only position learned has it; set it to null",
        ),
    ],
)
def test_fields_that_do_not_fit(config: ModelConfig, fault: str) -> None:
    assert [str(found) for found in position_faults(config)] == [fault]
