"""Attention layers with large parameters, and their comparison with the formulas of tests/reference.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.cache import LayerCache
from model.attention.registry import attention_class, rotary_widths, variant_of
from model.layers import UNSHARDED
from model.positions.masks import AttentionMask
from model.positions.positions import Positions, make_positions
from tests import reference

BATCH, LENGTH = 2, 7


def layer_of(config: ModelConfig, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An attention layer whose parameters, biases and embeddings included, are far from zero."""
    layer: nn.Module = attention_class(config)(config, UNSHARDED).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return layer


def hidden(config: ModelConfig, length: int = LENGTH, dtype: torch.dtype = torch.float64, seed: int = 6) -> Tensor:
    """Random hidden states (S, B, H)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, BATCH, config.hidden_size, generator=generator, dtype=torch.float64).to(dtype)


def positions_of(
    config: ModelConfig,
    length: int = LENGTH,
    offset: int = 0,
    dtype: torch.dtype = torch.float64,
    mask: AttentionMask | None = None,
) -> Positions:
    return make_positions(config, length, offset, dtype, torch.device("cpu"), mask, rotary_widths=rotary_widths(config))


def through_a_cache(config: ModelConfig, layer: nn.Module, x_SBH: Tensor) -> Tensor:
    """The layer's outputs of a prompt, single tokens and two at once, one after the other."""
    cache, parts, offset = LayerCache(BATCH, variant_of(config).cached(config), LENGTH, x_SBH.dtype, x_SBH.device), [], 0
    with torch.no_grad():
        for part_SBH in x_SBH.split([3, 1, 2, 1]):
            parts.append(layer(part_SBH, positions_of(config, part_SBH.shape[0], offset), cache))
            offset += part_SBH.shape[0]
    return torch.cat(parts)


def assert_equals_formula(config: ModelConfig, mask: AttentionMask | None = None, kernels: Sequence[str] = ()) -> None:
    """Compare outputs, and the gradients of the input and of every parameter, with each kernel, by default that of `config`."""
    expected = by_formula(config, mask or AttentionMask())
    for kernel in kernels or [config.attention_kernel]:
        found = by_layer(config.model_copy(update={"attention_kernel": kernel}), mask)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10, msg=f"{name} by {kernel}")


def by_layer(config: ModelConfig, mask: AttentionMask | None) -> dict[str, Tensor | None]:
    """Outputs and the gradient of the input, (B, S, H), gradients of parameters by their names."""
    layer, x_SBH = layer_of(config), hidden(config).requires_grad_()
    out_SBH = layer(x_SBH, positions_of(config, mask=mask))
    out_SBH.backward(hidden(config, seed=7))
    assert x_SBH.grad is not None
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"outputs": out_SBH.detach().transpose(0, 1), "input": x_SBH.grad.transpose(0, 1), **gradients}


def by_formula(config: ModelConfig, mask: AttentionMask) -> dict[str, Tensor | None]:
    """The same from the formulas."""
    weights = {name: parameter.detach().requires_grad_() for name, parameter in layer_of(config).named_parameters()}
    x_BSH = hidden(config).transpose(0, 1).requires_grad_()
    out_BSH = reference.attention(
        config, x_BSH, weights, causal=mask.causal, valid_BT=mask.valid_BT, documents_BT=mask.documents_BT
    )
    out_BSH.backward(hidden(config, seed=7).transpose(0, 1))
    return {"outputs": out_BSH.detach(), "input": x_BSH.grad, **{name: weight.grad for name, weight in weights.items()}}
