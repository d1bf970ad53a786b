"""What the entries of variants declare, against the layers that they name and how they are used."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import GHAConfig, ModelConfig
from model.attention import registry
from model.attention.base import Attention
from model.attention.registry import attention_class, attention_names, attention_variant
from model.attention.variant import StockForm
from model.gha.faults import gha_faults
from model.gha.pruning import prune_config
from model.huggingface.fold import FoldedAttention, folded_attention
from model.huggingface.stock import find_stock
from model.layers import UNSHARDED
from model.positions.positions import Positions
from tests.needs import needs
from tests.unit.model.attention.layers import positions_of


def config_of(name: str, **changes: Any) -> ModelConfig:
    fields = {"hidden_size": 24, "num_layers": 2, "num_heads": 6, "head_dim": 4, "position": "none"} | changes
    return ModelConfig.model_validate({"attention": name, **needs(name), **fields})


def layer_of(config: ModelConfig) -> Attention:
    layer: Attention = attention_class(config)(config, UNSHARDED)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def stock_of(name: str) -> StockForm:
    stock = attention_variant(name).stock
    assert stock is not None
    return stock


@pytest.mark.parametrize("name", attention_names())
def test_parameters_of_the_module_itself_are_those_of_heads(name: str) -> None:
    config = config_of(name)
    layer = layer_of(config)
    assert isinstance(layer, Attention)
    own = dict(layer.named_parameters(recurse=False))
    assert {len(parameter) for parameter in own.values()} <= {6}
    assert sum(parameter.numel() for parameter in own.values()) == attention_variant(name).embeddings(config)
    assert set(layer.own_rows()) == set(own)


@pytest.mark.parametrize("name", attention_names())
def test_query_freedom_is_the_rank_of_the_derivative_of_the_queries(name: str) -> None:
    for changes in ({}, {"hidden_size": 30, "num_heads": 4, "head_dim": 10}):
        config = config_of(name, **changes)
        layer, positions = layer_of(config).double(), positions_of(config, 1)

        def queries(x_H: Tensor, layer: Attention = layer, positions: Positions = positions) -> Tensor:
            q_BNSD = layer.queries(x_H.view(1, 1, -1), positions)
            return layer.query_features(q_BNSD, layer.own_rows(), positions).flatten()

        generator = torch.Generator().manual_seed(6)
        x_H = torch.randn(config.hidden_size, dtype=torch.float64, generator=generator)
        jacobian = torch.autograd.functional.jacobian(queries, x_H)
        assert isinstance(jacobian, Tensor)
        assert int(torch.linalg.matrix_rank(jacobian)) == attention_variant(name).query_freedom(config)


@pytest.mark.parametrize("name", attention_names())
def test_heads_that_are_grouped_can_be_pruned(name: str) -> None:
    assert attention_variant(name).maps or attention_variant(name).pruning is None


@pytest.mark.parametrize("name", [name for name in attention_names() if attention_variant(name).pruning])
def test_what_follows_the_vote_differs_between_kept_heads(name: str) -> None:
    config, pruning = config_of(name), attention_variant(name).pruning
    choices = [((0, 1), (0, 1)), ((0, 5), (0, 5)), ((0, 1), (0, 5))]
    assert pruning is not None
    assert (len({str(prune_config(config, kept)) for kept in choices}) > 1) == pruning.follows_vote(config)


@pytest.mark.parametrize("name", [name for name in attention_names() if attention_variant(name).stock])
def test_stock_forms_compute_the_same_heads_of_keys(name: str) -> None:
    """Rows of each projection, and biases where the configuration has none."""
    config, stock = config_of(name, bias=False), stock_of(name)
    layer, kv_heads = layer_of(config), stock_of(name).kv_heads(config)
    folded = folded_attention(config, layer.get_parameter, 6, kv_heads)
    module, _, class_name = stock.fold.partition(":")
    assert type(folded) is getattr(importlib.import_module(module), class_name)
    assert isinstance(folded, FoldedAttention)
    made = {"query": folded.query(), "key": folded.key(), "value": folded.value(), "output": folded.output()}
    assert [len(made[part].weight) for part in made] == [24, 4 * kv_heads, 4 * kv_heads, 24]
    assert any(bool(affine.bias.any()) for affine in made.values()) == stock.adds_biases
    assert stock.refusal(config) is None


def test_what_an_entry_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = dataclasses.replace(attention_variant("mha"), pruning=None, stock=None)
    monkeypatch.setitem(registry._VARIANTS, "bare", bare)
    config = config_of("bare")
    assert find_stock(config).reason == "no stock model computes model.attention: bare"
    with pytest.raises(ValueError, match="'bare': has no stock form in its registry entry"):
        folded_attention(config, nn.Linear(1, 1).get_parameter, 6, 6)
    with pytest.raises(UserError, match="'bare': the heads of bare cannot be told apart or pruned; only those of mha, gqa"):
        prune_config(config, ((0,), (0,)))
    for stage, faults in (("constrain", 0), ("vote", 1)):
        gha = GHAConfig.model_construct(**GHAConfig().model_dump() | {"stage": stage, "groups": 2})
        found = gha_faults({"model": config, "gha": gha})
        assert len(found) == faults, found
