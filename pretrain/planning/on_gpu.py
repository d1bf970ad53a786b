"""What kernels of GPUs keep and allocate where those of CPUs, on which fake tensors run, do otherwise.

From torch's source: `_flash_attention_forward` and `_backward`, `_efficient_attention_backward` (aten/src/ATen/native/
transformers/cuda) and `_fused_rms_norm` (aten/src/ATen/native/cuda/layer_norm_kernel.cu).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.heads import repeat_heads

HALF = (torch.bfloat16, torch.float16)


class OnGPU(TorchFunctionMode):
    """While it is on, fused attention and RMSNorm keep what they would on a GPU. The results have no meaning."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attention(*args[:3], bias=given.get("attn_mask"))
        if function is torch.rms_norm:
            x, _, weight = (*args, given.get("weight"))[:3]
            return _FusedRMSNorm.apply(x, weight)
        return function(*args, **given)


def _attention(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias: Tensor | None) -> Tensor:
    """Flash attention takes fewer heads of keys; the memory-efficient kernel (fp32, or a bias) needs a copy for each head."""
    flash = q_BNSD.dtype in HALF and bias is None
    if not flash and k_BKTD.shape[1] < q_BNSD.shape[1]:
        k_BKTD, v_BKTD = (repeat_heads(x_BKTD, q_BNSD.shape[1]) for x_BKTD in (k_BKTD, v_BKTD))
    out_BNSD: Tensor = _FusedAttention.apply(q_BNSD, k_BKTD, v_BKTD, bias)
    return out_BNSD


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, queries, _ = q_BNSD.shape
        out_BNSD = q_BNSD.new_empty(batch, queries, heads, v_BKTD.shape[3]).transpose(1, 2)
        sums_BNS = q_BNSD.new_empty(batch, heads, queries, dtype=torch.float32)
        ctx.save_for_backward(q_BNSD, k_BKTD, v_BKTD, bias, out_BNSD, sums_BNS)
        return out_BNSD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_BNSD, k_BKTD, v_BKTD, _, _, sums_BNS = ctx.saved_tensors
        products_BNS, of_queries = torch.empty_like(sums_BNS), None
        if q_BNSD.dtype in HALF:  # summed in float32
            of_queries = q_BNSD.new_empty(q_BNSD.shape, dtype=torch.float32)
        heads, key_heads = q_BNSD.shape[1], k_BKTD.shape[1]
        of_heads = [x.new_empty(x.shape[0], heads, *x.shape[2:]) for x in (k_BKTD, v_BKTD) if key_heads < heads]
        own = [torch.empty_like(x) for x in (q_BNSD, k_BKTD, v_BKTD)]
        del products_BNS, of_queries, of_heads
        return (*own, None)


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
