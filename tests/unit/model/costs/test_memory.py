"""Training state by hand, cache bytes against real caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.schema import AverageConfig
from model.attention.registry import attention_variant
from model.costs.memory import Sharding, StateBytes, average_bytes, kv_cache_bytes_per_token, overhang, state_bytes
from model.decoder import DecoderLM
from tests.needs import causal_names
from tests.unit.model.costs.models import PATTERN, model_config


@pytest.mark.parametrize(
    ("sharding", "bf16", "expected"),
    [  # 1000 parameters over 8 ranks, 125 each
        ("zero0", False, (4000, 4000, 4000, 8000)),
        ("zero1", False, (4000, 4000, 500 + 500, 1500)),
        ("zero1", True, (2000, 4000 + 2000, 4000 + 2000, 1500)),
        ("zero2", False, (4000, 500, 500 + 500, 1500)),
        ("zero2", True, (2000, 500, 500, 1500)),
        ("zero3", False, (500, 500, 500 + 500, 1500)),
        ("zero3", True, (250, 500, 500 + 500, 1500)),
        ("fsdp", False, (500, 500, 500, 1000)),
        ("fsdp", True, (500, 500, 500, 1000)),
    ],
)
def test_training_state_of_a_rank(sharding: Sharding, bf16: bool, expected: tuple[int, ...]) -> None:
    assert state_bytes({8: 1000}, sharding, 8, bf16) == StateBytes(*expected)
    assert state_bytes({8: 999}, sharding, 8, bf16).optimizer == (8000 - 8 if sharding == "zero0" else expected[3])


def test_training_state_that_is_not_sharded() -> None:
    assert state_bytes({8: 1000}, "zero3", 8, True, unsharded=40) == StateBytes(2 * (125 + 40), 500, 1000, 1500)
    assert state_bytes({8: 1000}, "zero3", 1, True, unsharded=40).parameters == 2000
    assert state_bytes({8: 1000}, "zero2", 8, False, overhang=30) == StateBytes(4000, 4 * 155, 4 * 155 + 500, 1500)
    assert state_bytes({8: 1000}, "zero1", 8, False, overhang=30).accumulated == 4000
    assert state_bytes({8: 1000}, "zero2", 8, True, overhang=30) == state_bytes({8: 1000}, "zero2", 8, True)
    with pytest.raises(ValueError, match="ZeRO 0 has no bf16"):
        state_bytes({8: 1000}, "zero0", 8, True)


@pytest.mark.parametrize(
    ("sharding", "optimizer"),
    [  # 500 parameters with one state, 400 with two, 100 with none
        ("zero0", 500 * 4 + 400 * 8),
        ("zero1", (1000 * 4 + 500 * 4 + 400 * 8) // 4),
        ("zero3", (1000 * 4 + 500 * 4 + 400 * 8) // 4),
        ("fsdp", (500 * 4 + 400 * 8) // 4),
    ],
)
def test_parameters_with_other_states_than_others(sharding: Sharding, optimizer: int) -> None:
    found = state_bytes({4: 500, 8: 400, 0: 100}, sharding, 4, bf16=False)
    assert found == replace(state_bytes({8: 1000}, sharding, 4, bf16=False), optimizer=optimizer)


def test_parameters_that_reach_beyond_a_shard() -> None:
    sizes = [30, 50, 20, 10]  # shards of 28: [0, 28), [28, 56), [56, 84), [84, 110)
    assert [overhang(sizes, 4, rank) for rank in range(4)] == [30 - 28, 80 - 28, 70 - 28, 30 - 26]
    assert overhang(sizes, 1, 0) == 0
    assert [overhang([4, 4], 2, rank) for rank in range(2)] == [0, 0]
    assert overhang([1], 3, 2) == 0


@pytest.mark.parametrize("name", [*causal_names(), PATTERN])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cache_bytes_are_those_of_a_real_cache(name: str | tuple[str, ...], dtype: torch.dtype) -> None:
    rotates_embeddings = isinstance(name, str) and "embedding_position" in attention_variant(name).options
    config = model_config(name, position="rope", embedding_position="before" if rotates_embeddings else "after")
    model = DecoderLM(config).to(dtype)
    cache = model.new_cache(batch_size=2, capacity=5)
    with torch.no_grad():
        model.logits(torch.zeros(2, 5, dtype=torch.long), cache=cache)
    stored = sum(part.nbytes for layer in cache.layers for part in (layer.k_BKSD, layer.v_BKSD))
    assert kv_cache_bytes_per_token(config, dtype.itemsize) * 2 * 5 == stored


@pytest.mark.parametrize(
    ("name", "values"), [("mha", 2 * 24), ("gqa", 2 * 8), ("skv", 24), ("el", 24), ("mqa", 8), ("sha", 8), ("mhe_add", 8)]
)
def test_cached_values_of_a_token_and_layer(name: str, values: int) -> None:
    assert kv_cache_bytes_per_token(model_config(name), bytes_per_value=1) == 3 * values


@pytest.mark.parametrize(
    ("average", "expected"),
    [(AverageConfig(), 0), (AverageConfig(decay=0.9), 4 * 251), (AverageConfig(last=3), 3 * 4 * 251)],
)
def test_an_average_is_sharded_over_all_ranks(average: AverageConfig, expected: int) -> None:
    assert average_bytes(average, 1001, 4) == expected
