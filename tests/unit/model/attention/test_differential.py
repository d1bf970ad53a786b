"""Differential attention: what it contains, how it is computed, where λ begins, which heads can be compared and pruned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import GHAConfig, ModelConfig
from model.attention.differential import DifferentialAttention
from model.costs.flops import attention_cost
from model.decoder import DecoderLM
from model.faults import model_faults
from model.gha.faults import gha_faults
from model.gha.pruning import prune_config
from model.initialization import init_weights
from tests.unit.model.attention.layers import LENGTH, hidden, layer_of, positions_of
from tests.unit.model.attention.test_variants import model_config

POSITIONS = ("none", "alibi", "rope")


def outputs(config: ModelConfig, weights: dict[str, Tensor]) -> Tensor:
    layer = layer_of(config)
    layer.load_state_dict(layer.state_dict() | weights)
    out_SBH: Tensor = layer(hidden(config), positions_of(config))
    return out_SBH


@pytest.mark.parametrize("position", POSITIONS)
def test_v2_contains_gqa(position: str) -> None:
    """sigmoid(λ) is 0 at λ = −∞: what is left is attention of every other query. Equal queries and λ = 0 give half of it."""
    config, plain = (model_config(name, position=position, num_kv_heads=2) for name in ("diff_v2", "gqa"))
    weights = dict(layer_of(config).named_parameters())
    evens = {
        f"query.{kind}": weights[f"query.{kind}"].unflatten(0, (6, 2, 4))[:, 0].flatten(0, 1) for kind in ("weight", "bias")
    }
    shared = {name: weights[name] for name in ("key_value.weight", "key_value.bias", "out.weight")}
    expected = outputs(plain, shared | evens | {"out.bias": torch.zeros(10)})
    without = {"lambdas.weight": torch.zeros(6, 10), "lambdas.bias": torch.full((6,), -math.inf), "out.bias": torch.zeros(10)}
    torch.testing.assert_close(outputs(config, without), expected, rtol=0, atol=1e-12)
    twice = {name: tensor.unflatten(0, (6, 4)).repeat_interleave(2, dim=0).flatten(0, 1) for name, tensor in evens.items()}
    halved = outputs(config, without | twice | {"lambdas.bias": torch.zeros(6)})
    torch.testing.assert_close(halved, expected / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", POSITIONS)
def test_equal_halves_cancel_in_v1(position: str) -> None:
    """With equal maps a head is ±RMSNorm(A V) · (1 − λ_init), whatever λ is, and nothing at λ = 1."""
    config = model_config("diff", position=position)
    weights = dict(layer_of(config).named_parameters())
    same = {f"query.{kind}": twice(weights[f"query.{kind}"]) for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        keys, values = weights[f"key_value.{kind}"].unflatten(0, (6, 2, 4)).unbind(1)
        same[f"key_value.{kind}"] = torch.stack([twice(keys.flatten(0, 1)).view_as(keys), values], dim=1).flatten(0, 2)
    none = {f"lambdas.lambda_{name}": torch.zeros(2) for name in ("q1", "k1", "q2", "k2")}
    minus_two = none | {
        "lambdas.lambda_q2": torch.tensor([math.log(3), 0], dtype=torch.float64),
        "lambdas.lambda_k2": torch.ones(2),
    }
    bias = weights["out.bias"].detach()
    first = outputs(config, same | none) - bias  # 1 − λ = 0.8; the norm does not see it but for its epsilon
    other = outputs(config, same | minus_two) - bias  # λ = 1 − 3 + 0.2: 1 − λ = 2.8
    torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-3)
    assert first.abs().max() > 0.1
    one = none | {
        "lambdas.lambda_q1": torch.tensor([math.log(1.8), 0], dtype=torch.float64),
        "lambdas.lambda_k1": torch.ones(2),
    }
    torch.testing.assert_close(outputs(config, same | one) - bias, torch.zeros_like(first), rtol=0, atol=1e-10)


def twice(of_heads: Tensor) -> Tensor:
    """Rows of heads whose second half repeats the first."""
    return of_heads.unflatten(0, (6, 2, 2))[:, :1].repeat_interleave(2, dim=1).flatten(0, 2)


@pytest.mark.parametrize("position", ["none", "alibi"])
@pytest.mark.parametrize("name", ["diff", "diff_v2"])
def test_one_kernel_computes_both_maps_of_all_heads(monkeypatch: pytest.MonkeyPatch, name: str, position: str) -> None:
    """12 query heads on 2 heads of keys and values, none of them repeated, all as wide; ALiBi's bias is made once."""
    config, seen = model_config(name, position=position, num_kv_heads=2, attention_kernel="sdpa"), []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, **options: Any) -> Tensor:
        seen.append((q_BNSD.shape[1:], k_BKTD.shape[1:], v_BKTD.shape[1:], options["attn_mask"]))
        return kernel(q_BNSD, k_BKTD, v_BKTD, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    layer, positions = layer_of(config), positions_of(config)
    with torch.no_grad():
        for _ in range(2):
            layer(hidden(config), positions)
    shapes = [(12, LENGTH, 4), (2, LENGTH, 4), (2, LENGTH, 4)]
    assert [[tuple(shape) for shape in call[:3]] for call in seen] == [shapes, shapes]
    masks = [call[3] for call in seen]
    assert masks[0] is masks[1]
    assert (masks[0] is None) == (position == "none")
    if position == "alibi":
        assert torch.equal(masks[0][:, 0::2], masks[0][:, 1::2])


def test_lambda_begins_where_the_paper_says() -> None:
    """λ_init = 0.8 − 0.6 exp(−0.3 (l − 1)) for l = 1, 2, …, and vectors of N(0, 0.1)."""
    config = ModelConfig(attention=("diff", "mha"), hidden_size=512, num_layers=3, num_heads=2, vocab_size=5, position="none")
    model = DecoderLM(config)
    init_weights(model, seed=1)
    layers = [block.attention for block in model.blocks if isinstance(block.attention, DifferentialAttention)]
    assert [layer.lambda_init for layer in layers] == pytest.approx([0.2, 0.8 - 0.6 * math.exp(-0.6)])
    vectors = torch.cat([vector for layer in layers for vector in layer.lambdas.parameters()])
    assert len(vectors) == 2 * 4 * 128
    assert float(vectors.std().detach()) == pytest.approx(0.1, rel=0.1)
    assert all(torch.equal(layer.head_norm.weight, torch.ones(256)) for layer in layers)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"attention": "diff", "num_kv_heads": 4},
            "num_kv_heads 4 must divide num_heads (6); null: keys and values for each head",
        ),
        ({"attention": "diff_v2", "num_kv_heads": 5}, "num_kv_heads 5 must divide num_heads (6)"),
        (
            {"attention": "diff", "head_dim": 5},
            "head_dim 5 diff has two queries and two keys of head_dim / 2 in a head: must be",
        ),
        (
            {"attention": "diff", "head_dim": 6, "position": "rope"},
            "head_dim / 2 in a head, of which position rope rotates channels in pairs: must be a multiple of 4",
        ),
        ({"attention": "diff", "hidden_size": 36, "position": "rope"}, "must be a multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], expected: str) -> None:
    fields: dict[str, Any] = {"hidden_size": 24, "num_layers": 1, "num_heads": 6, "position": "none"} | changes
    (fault,) = model_faults({"model": ModelConfig(**fields)})
    assert expected in f"{fault.key.removeprefix('model.')} {fault.value} {fault.allowed}"


@pytest.mark.parametrize(
    ("feature_map", "num_kv_heads", "expected"),
    [
        ("value", None, None),
        ("value", 2, "share their values; take output"),
        ("output", 2, None),
        ("attention", None, "have no single softmax; take value or output"),
    ],
)
@pytest.mark.parametrize("name", ["diff", "diff_v2"])
def test_feature_maps_that_tell_heads_apart(
    name: str, feature_map: str, num_kv_heads: int | None, expected: str | None
) -> None:
    gha = GHAConfig(stage="constrain", groups=2, feature_map=feature_map)  # type: ignore[arg-type]
    faults = gha_faults({"model": model_config(name, num_kv_heads=num_kv_heads), "gha": gha})
    assert [fault.key for fault in faults] == ([] if expected is None else ["gha.feature_map"])
    assert expected is None or expected in str(faults[0].allowed)


@pytest.mark.parametrize(("name", "queries", "values"), [("diff", 24, 48), ("diff_v2", 48, 48)])
def test_costs_of_both_maps(name: str, queries: int, values: int) -> None:
    """Of 5 pairs, forward and with the backward pass: products with queries and values, and exponentials of 12 maps."""
    config = model_config(name)
    forward, both = (attention_cost(config, 5, backward, shares_scores=False) for backward in (False, True))
    assert forward == (2 * 5 * (queries + values), 5 * 12)
    assert both == (2 * 5 * (4 * queries + 3 * values), 2 * 5 * 12)


@pytest.mark.parametrize(
    ("num_kv_heads", "kept", "expected"),
    [(None, (0, 1, 5), None), (2, (0, 2, 3, 4), 2), (2, (3, 4, 5), 1), (2, (0, 1, 5), None), (6, (0, 5), 2)],
)
@pytest.mark.parametrize("name", ["diff", "diff_v2"])
def test_key_value_heads_that_stay(name: str, num_kv_heads: int | None, kept: tuple[int, ...], expected: int | None) -> None:
    """None: each head has its own, here also where the kept heads share theirs unevenly."""
    pruned = prune_config(model_config(name, num_kv_heads=num_kv_heads), [kept])
    assert (pruned.attention, pruned.num_heads, pruned.num_kv_heads) == (name, len(kept), expected)
