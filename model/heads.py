"""Heads side by side in one dimension, or in a dimension of their own."""

from __future__ import annotations

from torch import Tensor


def split_heads(x_SBH: Tensor, head_dim: int) -> Tensor:
    """(S, B, N·head_dim) → (B, N, S, head_dim), a view."""
    return x_SBH.unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3)


def merge_heads(x_BNSD: Tensor) -> Tensor:
    """(B, N, S, D) → (S, B, N·D)."""
    return x_BNSD.permute(2, 0, 1, 3).flatten(2)


def repeat_heads(x_BKTD: Tensor, heads: int) -> Tensor:
    """Repeat each of the K heads heads/K times in a row: a view with stride 0 if K is 1, otherwise a copy."""
    return x_BKTD.unsqueeze(2).expand(-1, -1, heads // x_BKTD.shape[1], -1, -1).flatten(1, 2)
