"""Attention on CUDA by torch's fused kernels and by Triton's shared scores, against the papers' formulas.

Never by torch's math backend, the one that stores every head's S × T scores.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.schema import ModelConfig
from model.attention.registry import attention_class, rotary_widths
from model.layers import UNSHARDED
from model.positions.positions import make_positions
from tests import reference
from tests.needs import needs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
POSITIONS = [("none", "after"), ("alibi", "after"), ("rope", "after"), ("rope", "before")]
CASES = [
    (name, position, embedding_position, kernel)
    for name in ("mha", "gqa", "mqa", "mhe_add", "mhe_mul")
    for position, embedding_position in POSITIONS
    for kernel in ("sdpa", "shared_scores")
    if (embedding_position == "after" or name.startswith("mhe"))
    and (kernel == "sdpa" or (name == "mhe_add" and embedding_position == "after"))
]


@pytest.mark.parametrize(("name", "position", "embedding_position", "kernel"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("length", [33, 64, 200])  # 33: not a multiple of any alignment
def test_fused_kernels_equal_the_formulas(
    name: str, position: str, embedding_position: str, kernel: str, dtype: torch.dtype, tolerance: float, length: int
) -> None:
    fields: dict[str, Any] = {"position": position, "embedding_position": embedding_position, "attention_kernel": kernel}
    fields |= needs(name)
    config = ModelConfig(
        **fields,
        attention=name,
        hidden_size=48,
        num_layers=1,
        num_heads=6,
        head_dim=16,
        bias=False,
    )
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(1)
    layer: torch.nn.Module = attention_class(config)(config, UNSHARDED).to(device, dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    x_SBH = torch.randn(length, 2, 48, generator=generator).to(device, dtype).requires_grad_()
    grad_SBH = torch.randn(length, 2, 48, generator=generator).to(device, dtype)
    with sdpa_kernel(FUSED):
        out_SBH = layer(x_SBH, make_positions(config, length, 0, dtype, device, rotary_widths=rotary_widths(config)))
        out_SBH.backward(grad_SBH)

    weights = {key: parameter.detach().double().cpu().requires_grad_() for key, parameter in layer.named_parameters()}
    x_batch_first = x_SBH.detach().double().cpu().transpose(0, 1).clone().requires_grad_()
    expected = reference.attention(config, x_batch_first, weights)
    expected.backward(grad_SBH.double().cpu().transpose(0, 1))
    assert x_SBH.grad is not None
    pairs = {"out": (out_SBH.transpose(0, 1), expected), "x": (x_SBH.grad.transpose(0, 1), x_batch_first.grad)}
    pairs |= {key: (parameter.grad, weights[key].grad) for key, parameter in layer.named_parameters()}
    for key, (actual, wanted) in pairs.items():
        wanted = torch.zeros_like(weights[key]) if wanted is None else wanted
        assert actual is not None, key
        assert (actual.double().cpu() - wanted).norm() <= tolerance * wanted.norm() + 1e-12, key
