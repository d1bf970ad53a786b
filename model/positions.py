"""Where tokens stand: rotary tables and ALiBi biases, made once per forward pass and shared by all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ModelConfig


@dataclass(frozen=True)
class Positions:
    """The S tokens of this pass, standing after `offset` tokens in the cache; T = offset + S keys in all.

    `rotary`: cos and sin, each (T, head_dim/2), of all keys, the queries being the last S rows; None without rope.
    `bias` (1, N, S, T): ALiBi, with the causal mask in it; None without alibi.
    """

    offset: int = 0
    rotary: tuple[Tensor, Tensor] | None = None
    bias: Tensor | None = None


def make_positions(config: ModelConfig, length: int, offset: int, dtype: torch.dtype, device: torch.device) -> Positions:
    """Positions of `length` tokens after `offset` cached ones, for hidden states of `dtype`.

    Made anew for each pass rather than kept as buffers: they cost less than one layer's norm, have no longest sequence, and no
    cast of the model to bf16 can round their angles.
    """
    rotary = bias = None
    if config.position == "rope":
        rotary = rotary_tables(offset + length, config.head_width, config.rope_theta, dtype, device)
    elif config.position == "alibi":
        bias = alibi_bias(config.num_heads, length, offset, dtype, device)
    return Positions(offset, rotary, bias)


def rotary_tables(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim/2) of position · theta^(-2c/head_dim), in float32 or wider (RoFormer, arXiv 2104.09864)."""
    dtype = torch.promote_types(dtype, torch.float32)
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=dtype, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x_BNSD: Tensor, positions: Positions) -> Tensor:
    """RoPE of this pass's tokens; channel c turns with c + head_dim/2, as in Llama. Unchanged where there is no rope."""
    if positions.rotary is None:
        return x_BNSD
    cos, sin = (table[positions.offset :] for table in positions.rotary)
    first, second = x_BNSD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BNSD.dtype)


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of each head (Press et al., arXiv 2108.12409, section 3 and the released code).

    A geometric sequence from 2^(-8/n) for a power of two; otherwise that of the power below, then every second slope of the
    power above.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return slopes + [2.0 ** (-4 * (i + 1) / below) for i in range(0, 2 * (num_heads - below), 2)]


def alibi_bias(num_heads: int, length: int, offset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, N, S, T): −slope · (t − j) for the keys j ≤ t, −inf for later ones.

    Softmax would allow the key's part +slope · j alone; the distance is small near the diagonal, where bf16 must be fine.
    """
    slopes = torch.tensor(alibi_slopes(num_heads), dtype=torch.promote_types(dtype, torch.float32), device=device)
    keys = torch.arange(offset + length, device=device)
    distance = keys[offset:, None] - keys[None, :]
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill_(distance < 0, -math.inf).to(dtype)[None]
