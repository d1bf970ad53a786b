"""The steps that all variants share: keys and values of another stream, calls of `Layers`, what a constraint gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.base import Attention
from model.attention.registry import attention_class, rotary_widths
from model.gha.constraint import FeatureMaps
from model.layers import Layers
from model.positions.masks import AttentionMask
from model.positions.positions import Positions, make_positions
from tests import reference
from tests.needs import causal_names, needs

QUERIES, KEYS, BATCH = 5, 8, 2
ROPE: dict[str, Any] = {"position": "rope"}
CHANGES: list[dict[str, Any]] = [{}, ROPE]
EMBEDDED: list[dict[str, Any]] = [{"key_embedding": False}, ROPE | {"embedding_position": "before"}, {"num_seeds": 2}]
CASES = [
    pytest.param(name, changes, id="-".join([name, *map(str, changes.values())]))
    for name in causal_names()
    for changes in CHANGES + (EMBEDDED if name.startswith("mhe") else [])
]
PADDING = torch.tensor([[True] * 5 + [False] * 3, [False] * 2 + [True] * 6])


class Counting(Layers):
    """Counts the calls in which ranks would communicate."""

    def __init__(self) -> None:
        super().__init__()
        self.projected: list[int] = []
        self.asked: list[int] = []

    def project(self, x_SBH: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        self.projected.append(len(linears))
        return super().project(x_SBH, *linears)

    def own_heads(self, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        self.asked.append(len(parameters))
        return super().own_heads(*parameters)


def build(name: str, **changes: Any) -> tuple[ModelConfig, Attention, Counting]:
    fields: dict[str, Any] = {"hidden_size": 24, "num_layers": 1, "num_heads": 6, "head_dim": 4, "position": "none"} | changes
    config = ModelConfig(attention=name, **needs(name) | fields)
    layers = Counting()
    layer: Attention = attention_class(config)(config, layers).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return config, layer, layers


def stream(length: int, seed: int) -> Tensor:
    return torch.randn(length, BATCH, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions_of(config: ModelConfig, length: int, mask: AttentionMask) -> Positions:
    return make_positions(config, length, 0, torch.float64, torch.device("cpu"), mask, rotary_widths=rotary_widths(config))


@pytest.mark.parametrize("valid_BT", [None, PADDING], ids=["all", "padding"])
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_keys_and_values_of_another_stream(name: str, changes: dict[str, Any], valid_BT: Tensor | None) -> None:
    """Without ALiBi, whose distances have no meaning between streams. Also checks gradients of both streams."""
    config, layer, _ = build(name, **changes)
    x_SBH, y_TBH = stream(QUERIES, 1).requires_grad_(), stream(KEYS, 2).requires_grad_()
    mask = AttentionMask(causal=False, valid_BT=valid_BT)
    of_x, of_y = positions_of(config, QUERIES, mask), positions_of(config, KEYS, mask)
    k_BKTD, v_BKTD = layer.keys_values(y_TBH, of_y)
    k_BKTD, v_BKTD = layer.unpack(k_BKTD, v_BKTD, of_y)
    heads_SBF = layer.heads(layer.queries(x_SBH, of_x), k_BKTD, v_BKTD, layer.own_rows(), of_x, "math")
    found = layer.out(heads_SBF)

    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x_BSH, y_BTH = (z.detach().transpose(0, 1).clone().requires_grad_() for z in (x_SBH, y_TBH))
    expected = reference.attention(config, x_BSH, weights, source=y_BTH, causal=False, valid_BT=valid_BT)
    torch.testing.assert_close(found.transpose(0, 1), expected, rtol=0, atol=1e-10)
    grad = stream(QUERIES, 3)
    found.backward(grad)
    expected.backward(grad.transpose(0, 1))
    for one, other in ((x_SBH, x_BSH), (y_TBH, y_BTH)):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.transpose(0, 1), other.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_self_attention_is_these_steps_on_one_stream(name: str, changes: dict[str, Any]) -> None:
    config, layer, _ = build(name, **changes)
    x_SBH, positions = stream(QUERIES, 1), positions_of(config, QUERIES, AttentionMask())
    k_BKTD, v_BKTD = layer.unpack(*layer.keys_values(x_SBH, positions), positions)
    heads_SBF = layer.heads(layer.queries(x_SBH, positions), k_BKTD, v_BKTD, layer.own_rows(), positions, "math")
    torch.testing.assert_close(layer.out(heads_SBF), layer(x_SBH, positions), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", causal_names())
def test_a_stream_and_rows_of_heads_move_between_ranks_once(name: str) -> None:
    config, layer, layers = build(name)
    layer(stream(QUERIES, 1), positions_of(config, QUERIES, AttentionMask()))
    own = len(list(layer.parameters(recurse=False)))
    assert layers.projected == [len({*layer.of_queries, *layer.of_keys_values})]
    assert layers.asked == ([own] if own else [])


@pytest.mark.parametrize("changes", [{}, ROPE | {"embedding_position": "before"}, {"num_seeds": 3}])
@pytest.mark.parametrize("name", ["mha", "gqa", "skv", "mhe_add", "mhe_mul"])
def test_what_a_constraint_is_given(name: str, changes: dict[str, Any]) -> None:
    """Queries of some rows and keys give the attention weights of the layer; values are those of heads or of all heads."""
    config, layer, _ = build(name, **(changes if name.startswith("mhe") else {}))
    positions, seen = positions_of(config, QUERIES, AttentionMask()), []

    class Constraint:
        layers = layer.layers

        def __call__(self, heads_SBF: Tensor, maps: FeatureMaps) -> Tensor:
            seen.append((heads_SBF, maps))
            return heads_SBF

    layer.constraint = Constraint()  # type: ignore[assignment]
    x_SBH = stream(QUERIES, 1)
    layer(x_SBH, positions)
    ((heads_SBF, maps),) = seen
    rows_R = torch.tensor([1, 4])
    q_BNRD, k_BKTD = maps.queries(rows_R), maps.keys
    k_BNTD, v_BNTD = (z.repeat_interleave(6 // z.shape[1], dim=1) for z in (k_BKTD, maps.values))
    scores = (q_BNRD @ k_BNTD.transpose(2, 3)) / 2
    scores = scores.masked_fill(torch.arange(QUERIES) > rows_R[:, None], -torch.inf)
    found = layer.head_outputs(scores.softmax(-1) @ v_BNTD, layer.own_rows())
    expected = heads_SBF[rows_R].unflatten(-1, (6, 4)).permute(1, 2, 0, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert maps.positions is positions
    values = maps.values if name == "gqa" else layer.head_outputs(v_BNTD, layer.own_rows())  # those of groups, or of heads
    flat_NF = values.transpose(0, 1).flatten(1)
    torch.testing.assert_close(maps.value_gram(maps.values), flat_NF @ flat_NF.T)
