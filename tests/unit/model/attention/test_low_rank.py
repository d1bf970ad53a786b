"""What MFA, MHE-ADD of low rank and TPA contain, what TPA caches, and their initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention.cache import LayerCache
from model.attention.kernels import Choice
from model.attention.registry import attention_variant
from model.decoder import DecoderLM
from model.initialization import init_weights
from tests.unit.model.attention.layers import BATCH, LENGTH, hidden, layer_of, positions_of
from tests.unit.model.attention.test_variants import POSITIONS, assert_same, model_config, outputs

STYLES: list[dict[str, Any]] = [*POSITIONS, {"position": "rope", "qk_norm": True}]


@pytest.mark.parametrize("changes", [*STYLES, {"position": "rope", "embedding_position": "before", "num_seeds": 3}])
def test_rank_0_is_mhe_add(changes: dict[str, Any]) -> None:
    config, low_config = model_config("mhe_add", **changes), model_config("mhe_low_rank", **changes, query_rank=0)
    layer, low = layer_of(config), layer_of(low_config)
    low.load_state_dict(layer.state_dict())
    x_SBH = hidden(config)
    assert torch.equal(outputs(low, low_config, x_SBH), outputs(layer, config, x_SBH))


@pytest.mark.parametrize("changes", STYLES)
@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_full_rank_without_embeddings_contains_mqa(changes: dict[str, Any], shared: float) -> None:
    """U is the identity; what the shared query adds, whatever it is, the products of each head subtract."""
    config = model_config("mqa", **changes)
    low_config = model_config("mhe_low_rank", **changes, query_rank=config.hidden_size)
    layer, low = layer_of(config), layer_of(low_config)
    own, state = layer.state_dict(), low.state_dict()
    for kind in ("weight", "bias"):
        query = shared * state[f"qkv.{kind}"][: config.head_width]
        state[f"qkv.{kind}"] = torch.cat([query, own.pop(f"key_value.{kind}")])
        own[f"query.{kind}"] = own[f"query.{kind}"] - torch.cat([query] * config.num_heads)
    state |= own | {name: torch.zeros_like(state[name]) for name in state if name.endswith("_embedding")}
    state["query_down.weight"] = torch.eye(config.hidden_size, dtype=torch.float64)
    state["query_down.bias"] = torch.zeros(config.hidden_size, dtype=torch.float64)
    low.load_state_dict(state)
    assert_same(layer, config, low, low_config)


@pytest.mark.parametrize(("query_rank", "kernel"), [(0, "shared_scores"), (4, "sdpa")])
def test_only_rank_0_shares_scores(monkeypatch: pytest.MonkeyPatch, query_rank: int, kernel: str) -> None:
    """With enough heads and keys to gain on a CPU."""
    chosen: list[Choice] = []
    monkeypatch.setattr("model.attention.kernels._announce", chosen.append)
    config = model_config("mhe_low_rank", query_rank=query_rank, num_heads=32)
    x_SBH = hidden(config, 80)
    low = layer_of(config)(x_SBH, positions_of(config, 80))
    assert chosen[0].kernel == kernel
    exact_config = config.model_copy(update={"attention_kernel": "math"})
    torch.testing.assert_close(low, layer_of(exact_config)(x_SBH, positions_of(config, 80)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("changes", POSITIONS)
def test_tpa_with_constant_factors_over_heads_is_mha(changes: dict[str, Any]) -> None:
    """Section 3.4 of arXiv 2501.06425: with ranks n and the factors n · (unit vector r), head r is b_r."""
    config = model_config("mha", **changes)
    heads, width = config.num_heads, config.head_width
    tpa_config = model_config("tpa", **changes, query_rank=heads, key_rank=heads, value_rank=heads)
    layer, tpa = layer_of(config), layer_of(tpa_config)
    own, state = layer.state_dict(), tpa.state_dict()
    unit = heads * torch.eye(heads, dtype=torch.float64)
    state["query_head_factors.bias"] = unit.flatten()
    state["key_value_head_factors.bias"] = torch.cat([unit, unit], dim=1).flatten()
    for name in ("query", "key_value"):
        state[f"{name}_head_factors.weight"] = torch.zeros_like(state[f"{name}_head_factors.weight"])
    for kind in ("weight", "bias"):
        state[f"query_channel_factors.{kind}"] = own[f"query.{kind}"]
        by_heads = own[f"key_value.{kind}"].unflatten(0, (heads, 2, width))
        state[f"key_value_channel_factors.{kind}"] = by_heads.transpose(0, 1).flatten(0, 2)
        state[f"out.{kind}"] = own[f"out.{kind}"]
    tpa.load_state_dict(state)
    assert_same(layer, config, tpa, tpa_config)


def test_tpa_caches_factors() -> None:
    config = model_config("tpa", position="rope", key_rank=3, value_rank=2)
    cache = LayerCache(BATCH, attention_variant("tpa").cached(config), LENGTH, torch.float64, torch.device("cpu"))
    layer, x_SBH = layer_of(config), hidden(config)
    with torch.no_grad():
        found: Tensor = layer(x_SBH, positions_of(config), cache)
    torch.testing.assert_close(found, outputs(layer, config, x_SBH), rtol=0, atol=1e-12)
    assert cache.k_BKSD.shape == (BATCH, 3, LENGTH, config.num_heads + config.head_width)
    assert cache.v_BKSD.shape == (BATCH, 2, LENGTH, config.num_heads + config.head_width)


def test_factors_of_tpa_start_as_glorot_and_bengio_say() -> None:
    """Variance 2 / (inputs + outputs) of each weight; all else as in other variants."""
    config = model_config("tpa", hidden_size=200, num_heads=8, head_dim=32, query_rank=8, key_rank=4, value_rank=4)
    model = DecoderLM(config)
    init_weights(model, seed=3)
    for name, parameter in model.named_parameters():
        if "_factors.weight" in name:
            expected = (2 / sum(parameter.shape)) ** 0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.get_parameter("token_embedding.weight").std().item() == pytest.approx(config.init_std, rel=0.1)
