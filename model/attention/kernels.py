"""From queries, keys and values to heads: exact causal attention through torch's fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(x_SBH: Tensor, head_dim: int) -> Tensor:
    """(S, B, N·head_dim) → (B, N, S, head_dim), a view."""
    return x_SBH.unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3)


def merge_heads(x_BNSD: Tensor) -> Tensor:
    """(B, N, S, D) → (S, B, N·D)."""
    return x_BNSD.permute(2, 0, 1, 3).flatten(2)


def attend(q_BNSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ + bias) v under the causal mask, as (B, N, S, width of v).

    The S queries are the last of the T keys. K divides N: N/K neighbouring query heads read the same key and value head.
    `bias` (1, N, S, T) brings its own causal mask.
    """
    queries, keys = q_BNSD.shape[2], k_BKSD.shape[2]
    if bias is None and 1 < queries < keys:
        bias = torch.ones(queries, keys, dtype=torch.bool, device=q_BNSD.device).tril(keys - queries)
    width = v_BKSD.shape[3]
    if width < q_BNSD.shape[3]:
        # Flash kernels want q, k and v equally wide; without the zeros torch falls back to the S × T matrix of every head.
        v_BKSD = F.pad(v_BKSD, (0, q_BNSD.shape[3] - width))
    if not reads_grouped_heads(q_BNSD, bias):
        k_BKSD, v_BKSD = (repeat_heads(x_BKSD, q_BNSD.shape[1]) for x_BKSD in (k_BKSD, v_BKSD))
    out_BNSD = F.scaled_dot_product_attention(
        q_BNSD,
        k_BKSD,
        v_BKSD,
        attn_mask=bias,
        is_causal=bias is None and queries > 1,
        scale=scale,
        enable_gqa=k_BKSD.shape[1] < q_BNSD.shape[1],
    )
    return out_BNSD[..., :width]


def reads_grouped_heads(q_BNSD: Tensor, bias: Tensor | None) -> bool:
    """Whether torch has a kernel for these queries that takes fewer key heads than query heads without storing S × T scores.

    On CUDA only flash and cuDNN take them: half precision and, in flash, no mask. Everything else would go to the math backend,
    while the memory-efficient kernel only wants as many heads of K and V as of q. One query has no S × T to avoid.
    """
    half = q_BNSD.dtype in (torch.bfloat16, torch.float16)
    return not q_BNSD.is_cuda or q_BNSD.shape[2] == 1 or (half and bias is None)


def repeat_heads(x_BKSD: Tensor, heads: int) -> Tensor:
    """Each of the K heads heads/K times in a row: a view with stride 0 if K is 1, otherwise a copy."""
    return x_BKSD.unsqueeze(2).expand(-1, -1, heads // x_BKSD.shape[1], -1, -1).flatten(1, 2)
