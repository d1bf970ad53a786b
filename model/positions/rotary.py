"""Rotary positions (RoPE)."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.positions.positions import Positions


def rotary_tables(config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim/2) of position · theta^(-2c/head_dim) (RoFormer, arXiv 2104.09864)."""
    head_dim = config.head_width
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=dtype, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BNSD: Tensor, positions: Positions) -> Tensor:
    """Apply RoPE to this pass's tokens; channel c is paired with c + head_dim/2, as in Llama. No-op without a rotation."""
    if positions.rotary is None:
        return x_BNSD
    cos, sin = (table[..., positions.offset :, :] for table in positions.rotary)
    first, second = x_BNSD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BNSD.dtype)
