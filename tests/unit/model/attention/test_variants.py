"""Every variant of the registry against its formula in tests/reference.py, its cache, and the variants it contains.

All tests over `CASES` cover a new variant without a change; tests/needs.py has the fields that its configuration requires.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.baselines import SharedKeyValueAttention
from model.attention.cache import LayerCache
from model.attention.mhe import HEAD_EMBEDDINGS
from model.attention.registry import attention_class, attention_variant
from model.faults import model_faults
from model.layers import Layers
from model.positions.masks import AttentionMask
from tests.needs import causal_names, needs
from tests.unit.model.attention.layers import (
    LENGTH,
    assert_equals_formula,
    hidden,
    layer_of,
    positions_of,
    through_a_cache,
)

ODD: dict[str, dict[str, Any]] = {  # for three heads
    "gqa": {"num_kv_heads": 3},
    "diff": {"num_kv_heads": 3},
    "diff_v2": {"num_kv_heads": 3},
    "mla": {"query_rank": 3, "latent_dim": 5, "rope_dim": 6},
    "gla": {"num_latents": 3, "latent_dim": 15, "rope_dim": 2},
    "gta": {"num_kv_heads": 3, "head_dim": 8},
}
POSITIONS: list[dict[str, Any]] = [{"position": "none"}, {"position": "alibi"}, {"position": "rope"}]
EMBEDDINGS: list[dict[str, Any]] = [
    {"position": "rope", "embedding_position": "before"},
    {"position": "none", "key_embedding": False},
    {"position": "alibi", "key_embedding": False},
    {"position": "rope", "key_embedding": False},
    {"position": "rope", "embedding_position": "before", "key_embedding": False},
]
SEEDS: list[dict[str, Any]] = [{"position": "alibi", "num_seeds": 3}, {"position": "rope", "num_seeds": 3}]
EMBEDDINGS += [
    {"position": "rope", "embedding_position": "before", "num_seeds": 3},
    {"position": "rope", "head_embeddings": False, "num_seeds": 3},
    {"position": "alibi", "head_embeddings": False},
]
DIFFERENTIAL: list[dict[str, Any]] = [
    {"position": "alibi", "num_kv_heads": 2},
    {"position": "rope", "num_kv_heads": 3, "qk_norm": True},
]
LOW_RANK: list[dict[str, Any]] = [
    {"position": "rope", "embedding_position": "before"},
    {"position": "rope", "head_embeddings": False, "num_seeds": 3},
    {"position": "alibi", "key_embedding": False, "num_seeds": 3, "qk_norm": True},
    {"position": "none", "query_rank": 0},
]
CASES = [
    pytest.param(name, changes, id="-".join([name, *map(str, changes.values())]))
    for name in causal_names()
    for changes in POSITIONS
    + (SEEDS if name in ("sha", "mhe_add", "mhe_mul") else [])
    + (EMBEDDINGS if name in ("mhe_add", "mhe_mul") else [])
    + (LOW_RANK if name == "mhe_low_rank" else [])
    + (DIFFERENTIAL if name.startswith("diff") else [])
]
PADDING = torch.tensor([[True] * 5 + [False] * 2, [False] * 3 + [True] * 4])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
MASKS = {
    "bidirectional": AttentionMask(causal=False),
    "padding": AttentionMask(valid_BT=PADDING),
    "bidirectional-padding": AttentionMask(causal=False, valid_BT=PADDING),
    "documents": AttentionMask(documents_BT=DOCUMENTS),
    "all": AttentionMask(valid_BT=PADDING, documents_BT=DOCUMENTS),
}


def model_config(attention: str, **changes: Any) -> ModelConfig:
    """A valid configuration of one layer; the hidden size equals that of all heads only if it must."""
    fields: dict[str, Any] = {"attention": attention, "hidden_size": 10, "num_layers": 1, "num_heads": 6, "head_dim": 4}
    fields |= {"vocab_size": 11, "position": "none"} | needs(attention) | changes
    config = ModelConfig(**fields)
    if model_faults({"model": config}):
        fields["hidden_size"] = fields["num_heads"] * fields["head_dim"]
        config = ModelConfig(**fields)
    assert not model_faults({"model": config})
    return config


def outputs(layer: nn.Module, config: ModelConfig, x_SBH: Tensor, mask: AttentionMask | None = None) -> Tensor:
    positions = positions_of(config, x_SBH.shape[0], dtype=x_SBH.dtype, mask=mask)
    out_SBH: Tensor = layer(x_SBH, positions)
    return out_SBH


def kernels_of(name: str, changes: dict[str, Any]) -> list[str]:
    """Those that the configuration may ask for."""
    config = model_config(name, **changes)
    kernels = attention_variant(name).kernels
    return [kernel for kernel in kernels if not model_faults({"model": config.model_copy(update={"attention_kernel": kernel})})]


@pytest.mark.parametrize(("name", "changes"), CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_its_formula_forward_and_backward(name: str, changes: dict[str, Any], bias: bool) -> None:
    assert_equals_formula(model_config(name, bias=bias, **changes))


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_odd_widths_and_an_odd_number_of_heads(name: str, changes: dict[str, Any]) -> None:
    """Of diff, each half of a head."""
    width = (6 if changes["position"] == "rope" else 5) * (2 if name == "diff" else 1)
    assert_equals_formula(model_config(name, **{"num_heads": 3, "head_dim": width} | changes | ODD.get(name, {})))


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("number", range(len(CASES)))
def test_equals_its_formula_under_masks(number: int, turn: int) -> None:
    """Masks take turns: the cases of a variant see all of them."""
    values: Any = CASES[number].values
    name, changes = values
    mask = list(MASKS.values())[(2 * number + turn) % len(MASKS)]
    assert_equals_formula(model_config(name, **changes), mask, kernels_of(name, changes))


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_all_its_kernels_equal_its_formula(name: str, changes: dict[str, Any]) -> None:
    assert_equals_formula(model_config(name, **changes), kernels=kernels_of(name, changes))


@pytest.mark.parametrize(("name", "changes"), CASES)
@pytest.mark.parametrize("num_heads", [6, 3])
def test_prefill_and_single_tokens_through_a_cache_equal_one_pass(name: str, changes: dict[str, Any], num_heads: int) -> None:
    changes = changes | {"num_heads": num_heads} | (ODD.get(name, {}) if num_heads == 3 else {})
    config = model_config(name, **changes)
    layer, x_SBH = layer_of(config), hidden(config)
    found_SBH, expected_SBH = through_a_cache(config, layer, x_SBH), outputs(layer, config, x_SBH)
    torch.testing.assert_close(found_SBH, expected_SBH, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_bf16_is_close(name: str, changes: dict[str, Any]) -> None:
    config = model_config(name, **changes)
    exact_SBH = outputs(layer_of(config), config, hidden(config))
    rounded_SBH = outputs(layer_of(config).bfloat16(), config, hidden(config).bfloat16())
    assert rounded_SBH.dtype == torch.bfloat16
    assert (rounded_SBH - exact_SBH).norm() < 0.03 * exact_SBH.norm()


class CountingLayers(Layers):
    """Unsharded layers; `columns` counts outputs of a variant's projections, `rows` the inputs that it sums over."""

    def __init__(self) -> None:
        self.columns: list[nn.Module] = []
        self.rows: list[nn.Module] = []

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        self.columns.append(super().column(in_features, out_features, bias))
        return self.columns[-1]

    def shared(self, in_features: int, seeds: int, width: int, bias: bool) -> nn.Module:
        self.columns.append(super().shared(in_features, seeds, width, bias))
        return self.columns[-1]

    def key_value(self, in_features: int, heads: int, width: int, bias: bool) -> nn.Module:
        self.columns.append(super().key_value(in_features, heads, width, bias))
        return self.columns[-1]

    def expand(self, in_features: int, groups: int, out_features: int, bias: bool) -> nn.Module:
        self.columns.append(super().expand(in_features, groups, out_features, bias))
        return self.columns[-1]

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        self.rows.append(super().row(in_features, out_features, bias))
        return self.rows[-1]


@pytest.mark.parametrize("name", causal_names())
def test_every_projection_comes_from_the_layers(name: str) -> None:
    """What tensor parallelism relies on; the output projection sums over the heads."""
    config, layers = model_config(name), CountingLayers()
    layer = attention_class(config)(config, layers)
    assert [module for module in layer.modules() if isinstance(module, nn.Linear)] == [*layers.columns, *layers.rows]
    assert [layer.out] == layers.rows
    assert (layer.out.in_features, layer.out.out_features) == (config.num_heads * config.head_width, config.hidden_size)
    columns = sum(module.out_features for module in layers.columns if isinstance(module, nn.Linear))
    assert columns == sum(projection.columns for projection in attention_variant(name).projections(config).values())


def assert_same(narrow: nn.Module, narrow_config: ModelConfig, wide: nn.Module, wide_config: ModelConfig) -> None:
    x_SBH = hidden(narrow_config)
    expected_SBH = outputs(narrow, narrow_config, x_SBH)
    torch.testing.assert_close(outputs(wide, wide_config, x_SBH), expected_SBH, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", POSITIONS)
@pytest.mark.parametrize(("name", "num_kv_heads"), [("mha", 6), ("mqa", 1)])
def test_gqa_contains_mha_and_mqa(name: str, num_kv_heads: int, changes: dict[str, Any]) -> None:
    config, grouped_config = model_config(name, **changes), model_config("gqa", **changes | {"num_kv_heads": num_kv_heads})
    layer, grouped = layer_of(config), layer_of(grouped_config)
    grouped.load_state_dict(layer.state_dict())
    assert_same(layer, config, grouped, grouped_config)


@pytest.mark.parametrize("changes", [*POSITIONS, *EMBEDDINGS])
@pytest.mark.parametrize("name", ["mhe_add", "mhe_mul"])
def test_mhe_without_embeddings_is_sha(name: str, changes: dict[str, Any]) -> None:
    own = {key: changes[key] for key in ("position", "num_seeds") if key in changes}
    config, embedded_config = model_config("sha", **own), model_config(name, **changes)
    layer, embedded = layer_of(config), layer_of(embedded_config)
    missing, unexpected = embedded.load_state_dict(layer.state_dict(), strict=False)
    assert set(missing) <= set(HEAD_EMBEDDINGS)
    assert not unexpected
    with torch.no_grad():
        for embedding in missing:
            embedded.get_parameter(embedding).zero_()
    assert_same(layer, config, embedded, embedded_config)


@pytest.mark.parametrize("changes", POSITIONS)
@pytest.mark.parametrize("name", ["sha", "mhe_add", "mhe_mul"])
def test_a_seed_for_each_head_without_embeddings_is_mha(name: str, changes: dict[str, Any]) -> None:
    without = {} if name == "sha" else {"head_embeddings": False}
    config, seeds_config = model_config("mha", **changes), model_config(name, num_seeds=6, **without, **changes)
    layer, seeds, width = layer_of(config), layer_of(seeds_config), config.head_width
    state = layer.state_dict()
    for kind in ("weight", "bias"):
        query = state.pop(f"query.{kind}").unflatten(0, (6, 1, width))
        key_value = state.pop(f"key_value.{kind}").unflatten(0, (6, 2, width))
        state[f"qkv.{kind}"] = torch.cat([query, key_value], dim=1).flatten(0, 2)
    seeds.load_state_dict(state)
    assert_same(layer, config, seeds, seeds_config)


@pytest.mark.parametrize("changes", POSITIONS)
def test_sha_is_mqa_whose_heads_share_one_query(changes: dict[str, Any]) -> None:
    config, wide_config = model_config("sha", **changes), model_config("mqa", **changes)
    layer, wide, width = layer_of(config), layer_of(wide_config), config.head_width
    state = layer.state_dict()
    for kind in ("weight", "bias"):
        shared = state.pop(f"qkv.{kind}")
        state |= {f"query.{kind}": torch.cat([shared[:width]] * config.num_heads), f"key_value.{kind}": shared[width:]}
    wide.load_state_dict(state)
    assert_same(layer, config, wide, wide_config)


@pytest.mark.parametrize("changes", POSITIONS)
def test_skv_is_mha_whose_keys_are_its_values(changes: dict[str, Any]) -> None:
    config, wide_config = model_config("skv", **changes), model_config("mha", **changes)
    layer, wide = layer_of(config), layer_of(wide_config)
    state = layer.state_dict()
    for kind in ("weight", "bias"):
        heads = state[f"key_value.{kind}"].split(config.head_width)
        state[f"key_value.{kind}"] = torch.cat([head for head in heads for _ in range(2)])
    wide.load_state_dict(state)
    assert_same(layer, config, wide, wide_config)


@pytest.mark.parametrize("changes", POSITIONS)
def test_el_is_skv_that_projects_by_the_identity(changes: dict[str, Any]) -> None:
    config = model_config("el", **changes)
    wide_config = model_config("skv", hidden_size=config.hidden_size, **changes)
    layer, wide = layer_of(config), layer_of(wide_config)
    assert isinstance(wide, SharedKeyValueAttention)
    state = layer.state_dict()
    state["key_value.weight"] = torch.eye(config.hidden_size, dtype=torch.float64)
    state["key_value.bias"] = torch.zeros(config.hidden_size, dtype=torch.float64)
    wide.load_state_dict(state)
    assert_same(layer, config, wide, wide_config)


@pytest.mark.parametrize(("position", "heads"), [("none", 1), ("rope", 1), ("alibi", 6)])
def test_sha_computes_equal_heads_once(monkeypatch: pytest.MonkeyPatch, position: str, heads: int) -> None:
    config, seen = model_config("sha", position=position, attention_kernel="sdpa"), []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, **options: Any) -> Tensor:
        seen.append(q_BNSD.shape[1])
        return kernel(q_BNSD, k_BKTD, v_BKTD, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    outputs(layer_of(config), config, hidden(config))
    assert seen == [heads]


@pytest.mark.parametrize("name", ["skv", "el"])
def test_what_is_key_and_value_is_cached_once(name: str) -> None:
    config = model_config(name, position="rope")
    cache = LayerCache(1, attention_variant(name).cached(config), 9, torch.float64, torch.device("cpu"))
    layer, x_SBH = layer_of(config), hidden(config)[:, :1]
    with torch.no_grad():
        layer(x_SBH, positions_of(config), cache)
    assert cache.k_BKSD.numel() + cache.v_BKSD.numel() == LENGTH * config.num_heads * config.head_width
