"""Attention layers with large parameters, and their comparison with the formulas of tests/reference.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.attention.registry import attention_class
from model.layers import WHOLE
from model.positions.masks import AttentionMask
from model.positions.positions import Positions, make_positions
from tests import reference

BATCH, LENGTH = 2, 7


def layer_of(config: ModelConfig, dtype: torch.dtype = torch.float64) -> nn.Module:
    """An attention layer whose parameters, biases and embeddings included, are far from zero."""
    layer: nn.Module = attention_class(config.attention)(config, WHOLE).to(dtype)
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
    return make_positions(config, length, offset, dtype, torch.device("cpu"), mask)


def assert_equals_formula(config: ModelConfig, mask: AttentionMask | None = None) -> None:
    """Compares outputs, and the gradients of the input and of every parameter."""
    layer, x_SBH, grad_SBH = layer_of(config), hidden(config).requires_grad_(), hidden(config, seed=7)
    out_SBH = layer(x_SBH, positions_of(config, mask=mask))
    out_SBH.backward(grad_SBH)

    mask = mask or AttentionMask()
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in layer.named_parameters()}
    x_BSH = x_SBH.detach().transpose(0, 1).clone().requires_grad_()
    expected_BSH = reference.attention(
        config, x_BSH, weights, causal=mask.causal, valid_BT=mask.valid_BT, documents_BT=mask.documents_BT
    )
    expected_BSH.backward(grad_SBH.transpose(0, 1))
    assert x_SBH.grad is not None
    torch.testing.assert_close(out_SBH.transpose(0, 1), expected_BSH, rtol=0, atol=1e-10)
    torch.testing.assert_close(x_SBH.grad.transpose(0, 1), x_BSH.grad, rtol=0, atol=1e-10)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=0, atol=1e-10, msg=name)
