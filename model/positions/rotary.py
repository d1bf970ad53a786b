"""Rotary positions (RoPE)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import ModelConfig
from model.positions.positions import Positions
from model.positions.registry import rotated_channels


def rotary_tables(
    config: ModelConfig, width: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin (length, width/2) of position · theta^(-2c/r) (RoFormer, arXiv 2104.09864).

    r channels turn: all, or as many as `rope_fraction` says, as in GPT-NeoX. The other pairs have the angle 0.
    """
    rotated = rotated_channels(config, width)
    assert rotated is not None, "position_faults refuses other fractions"
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, rotated, 2, dtype=dtype, device=device) / rotated)
    frequencies = F.pad(frequencies, (0, (width - rotated) // 2))
    angles = torch.outer(torch.arange(length, dtype=dtype, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BNSD: Tensor, positions: Positions) -> Tensor:
    """Apply RoPE to this pass's tokens; channel c is paired with c + D/2, as in Llama. No-op without a rotation."""
    rotary = positions.rotary_of(x_BNSD.shape[-1])
    if rotary is None:
        return x_BNSD
    cos, sin = (table[..., positions.offset :, :] for table in rotary)
    first, second = x_BNSD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BNSD.dtype)
