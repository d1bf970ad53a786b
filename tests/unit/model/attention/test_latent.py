"""Latent attention: both of its forms, which one a pass takes, and what contains what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.latent import LatentAttention
from model.attention.registry import attention_variant
from model.positions.masks import AttentionMask
from tests.needs import needs
from tests.unit.model.attention.layers import BATCH, hidden, layer_of, positions_of

PADDING = torch.tensor([[True] * 5 + [False] * 2, [False] * 3 + [True] * 4])  # the first three queries of the second see no key
MASKS = {"causal": AttentionMask(), "padding": AttentionMask(valid_BT=PADDING)}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mla", {"position": "rope"}),
    ("mla", {"position": "alibi", "query_rank": None, "rope_dim": None}),
    ("gla", {"position": "rope", "bias": False}),
    ("gla", {"position": "none", "num_latents": 3}),
]


def config_of(name: str, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {"hidden_size": 10, "num_layers": 1, "num_heads": 6, "head_dim": 4, "position": "none"}
    return ModelConfig(attention=name, **fields | needs(name) | changes)


def latent_layer(config: ModelConfig) -> LatentAttention:
    layer = layer_of(config)
    assert isinstance(layer, LatentAttention)
    return layer


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("name", "changes"), CASES)
@pytest.mark.parametrize("kernel", ["math", "sdpa"])
def test_the_absorbed_form_equals_the_expanded_one(
    name: str, changes: dict[str, Any], mask: AttentionMask, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases of keys and values, queries that see no key, and gradients included. It expands nothing."""
    config = config_of(name, attention_kernel=kernel, **changes)
    layer, x_SBH, positions = latent_layer(config), hidden(config).requires_grad_(), positions_of(config, mask=mask)
    q_BNSD, (k_B1TF, v_B0TF) = layer.queries(x_SBH, positions), layer.keys_values(x_SBH, positions)
    own, grad = layer.own_rows(), hidden(config_of("mla", hidden_size=24), seed=1)
    expanded = layer.heads(q_BNSD, *layer.unpack(k_B1TF, v_B0TF, positions), own, positions, kernel)
    weights = [x_SBH, *(parameter for name, parameter in layer.named_parameters() if not name.startswith("out."))]
    expected = torch.autograd.grad(expanded, weights, grad, retain_graph=True)

    monkeypatch.setattr(layer.get_submodule("key_value"), "forward", None)
    absorbed = layer.absorbed_heads(q_BNSD, k_B1TF, own, positions)
    torch.testing.assert_close(absorbed, expanded, rtol=0, atol=1e-12)
    for found, gradient in zip(torch.autograd.grad(absorbed, weights, grad), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["mla", "gla"])
def test_a_prompt_is_expanded_and_later_tokens_are_absorbed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds latents and one key; keys of heads are made once, for the prompt."""
    config, expanded = config_of(name, position="rope"), list[int]()
    layer, length = latent_layer(config), 40
    x_SBH = hidden(config, length)
    expand = layer.get_submodule("key_value")
    forward = expand.forward

    def spy(latents_BTC: Tensor) -> Tensor:
        expanded.append(latents_BTC.shape[1])
        found: Tensor = forward(latents_BTC)
        return found

    monkeypatch.setattr(expand, "forward", spy)
    cache = LayerCache(BATCH, attention_variant(name).cached(config), length, x_SBH.dtype, x_SBH.device)
    parts, offset = [], 0
    with torch.no_grad():
        for part_SBH in x_SBH.split([38, 1, 1]):
            parts.append(layer(part_SBH, positions_of(config, part_SBH.shape[0], offset), cache))
            offset += part_SBH.shape[0]
        assert expanded == [38]
        assert cache.k_BKSD.shape == (BATCH, 1, length, 24 + 8)
        assert cache.v_BKSD.numel() == 0
        torch.testing.assert_close(torch.cat(parts), layer(x_SBH, positions_of(config, length)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 2), (2, 100), (30, 100), (50, 100), (100, 100), (90, 4000)])
def test_the_form_is_the_one_of_fewer_multiplications(queries: int, keys: int) -> None:
    layer = latent_layer(config_of("gla", head_dim=8, latent_dim=48))  # 2 latents of 24, a shared key of 8
    scores_and_values = queries * keys * (8 + 8 + 8)
    expanded = keys * 24 * 2 * 8 + scores_and_values
    absorbed = queries * 24 * 2 * 8 + queries * keys * 2 * (48 + 8)
    assert layer.absorbs(queries, keys, 48 + 8) == (absorbed < expanded)


def outputs(config: ModelConfig, state: dict[str, Tensor]) -> Tensor:
    layer = layer_of(config)
    layer.load_state_dict(state)
    out_SBH: Tensor = layer(hidden(config), positions_of(config))
    return out_SBH


def test_gla_with_one_latent_is_mla() -> None:
    config = config_of("mla", position="rope")
    state = layer_of(config).state_dict()
    same = config_of("gla", position="rope", num_latents=1, query_rank=16)
    assert torch.equal(outputs(same, state), outputs(config, state))


def test_gla_is_mla_whose_heads_ignore_other_latents() -> None:
    """Without the norm's coupling of latents, which weights of equal latents undo: both norm the same values."""
    config = config_of("gla", query_rank=16)
    state = layer_of(config).state_dict()
    for kind in ("weight", "bias"):  # two equal latents
        state[f"latent.{kind}"] = torch.cat([state[f"latent.{kind}"][:12]] * 2)
    wide = dict(state)
    wide["latent_norm.weight"] = torch.cat([state["latent_norm.weight"]] * 2)
    zeros = torch.zeros(24, 12, dtype=torch.float64)
    first, second = state["key_value.weight"].chunk(2)
    wide["key_value.weight"] = torch.cat([torch.cat([first, zeros], dim=1), torch.cat([zeros, second], dim=1)])
    torch.testing.assert_close(outputs(config_of("mla"), wide), outputs(config, state), rtol=0, atol=1e-12)


def test_gta_without_rotation_is_gqa_whose_keys_are_half_values() -> None:
    config, wide = config_of("gta", position="alibi"), config_of("gqa", position="alibi")
    state = layer_of(config).state_dict()
    same = dict(state)
    for kind in ("weight", "bias"):
        shared = same.pop(f"shared_key.{kind}")
        values = state[f"key_value.{kind}"].split(4)
        same[f"key_value.{kind}"] = torch.cat([part for value in values for part in (value[:2], shared, value)])
    torch.testing.assert_close(outputs(wide, same), outputs(config, state), rtol=0, atol=1e-12)
