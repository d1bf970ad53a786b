"""Where tokens stand and what they see: rotary tables, ALiBi slopes, the mask; made once per forward pass for all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from configs.schema import ModelConfig


@dataclass(frozen=True)
class AttentionMask:
    """Which of T keys each of S queries sees; the queries are the last S of the T tokens.

    `causal`: no later key. `valid_BT` (bool): False on padding, which no query sees. `documents_BT` (integers): a query sees
    the keys of its own document only. A query that sees no key at all attends to nothing: its heads are zero (MHE: e^V alone).
    """

    causal: bool = True
    valid_BT: Tensor | None = None
    documents_BT: Tensor | None = None

    def __post_init__(self) -> None:
        if self.valid_BT is not None and self.valid_BT.dtype != torch.bool:
            raise TypeError(f"valid_BT must be bool, not {self.valid_BT.dtype}")
        if self.documents_BT is not None and self.documents_BT.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"documents_BT must be int32 or int64, not {self.documents_BT.dtype}")

    @property
    def is_plain(self) -> bool:
        """Whether position alone decides: neither padding nor documents."""
        return self.valid_BT is None and self.documents_BT is None

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, S, T), True where a query sees a key; None where every query sees all."""
        parts = []
        if self.causal and queries > 1:
            parts.append(torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None])
        if self.valid_BT is not None:
            parts.append(self.valid_BT[:, None, None, :])
        if self.documents_BT is not None:
            parts.append(self.documents_BT[:, None, keys - queries :, None] == self.documents_BT[:, None, None, :])
        visible = None
        for part in parts:
            visible = part if visible is None else visible & part
        return visible


@dataclass(frozen=True)
class Positions:
    """The S tokens of this pass, standing after `offset` tokens in the cache; T = offset + S keys in all.

    `rotary`: cos and sin, each (T, head_dim/2), of all keys, the queries being the last S rows; None without rope.
    `slopes_N`: ALiBi's slope of each head; None without alibi. `dtype`: that of the hidden states.
    """

    length: int
    offset: int = 0
    rotary: tuple[Tensor, Tensor] | None = None
    slopes_N: Tensor | None = None
    mask: AttentionMask = field(default_factory=AttentionMask)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def of_rows(self, rows_R: Tensor) -> Positions:
        """For `rotate` of some of this pass's tokens, counted from its first."""
        if self.rotary is None:
            return self
        cos, sin = (table[self.offset + rows_R] for table in self.rotary)
        return replace(self, length=len(rows_R), offset=0, rotary=(cos, sin))

    @cached_property
    def visible(self) -> Tensor | None:
        """(B or 1, 1, S, T), or None where every query sees all keys."""
        return self.mask.visible(self.length, self.offset + self.length, self.device)

    @cached_property
    def blind(self) -> Tensor | None:
        """(B, 1, S, 1), True for a query that sees no key; None where padding leaves none such."""
        return None if self.mask.valid_BT is None or self.visible is None else ~self.visible.any(-1, keepdim=True)

    @cached_property
    def bias(self) -> Tensor | None:
        """What kernels that know neither slopes nor masks add to scores, (B or 1, N or 1, S, T), made when first asked for.

        None where `causal` says it all. A blind query gets no bias, so that softmax and its gradient stay finite.
        """
        if self.slopes_N is None and self.mask.is_plain and (not self.mask.causal or self.length == 1 or self.offset == 0):
            return None
        bias = torch.zeros((1, 1, 1, 1), device=self.device)
        if self.slopes_N is not None:
            keys = torch.arange(self.offset + self.length, device=self.device)
            bias = (-self.slopes_N[:, None, None] * (keys[self.offset :, None] - keys[None, :]))[None]
        if self.visible is not None:
            bias = torch.where(self.visible, bias, -math.inf)
        return (bias if self.blind is None else bias.masked_fill(self.blind, 0)).to(self.dtype)


def make_positions(
    config: ModelConfig,
    length: int,
    offset: int,
    dtype: torch.dtype,
    device: torch.device,
    mask: AttentionMask | None = None,
    heads: slice = slice(None),
) -> Positions:
    """Positions of `length` tokens after `offset` cached ones, for hidden states of `dtype` and these heads.

    Made anew for each pass rather than kept as buffers: they cost less than one layer's norm, have no longest sequence, and no
    cast of the model to bf16 can round their angles.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rotary = slopes_N = None
    if config.position == "rope":
        rotary = rotary_tables(offset + length, config.head_width, config.rope_theta, wide, device)
    elif config.position == "alibi":
        slopes_N = torch.tensor(alibi_slopes(config.num_heads)[heads], dtype=wide, device=device)
    return Positions(length, offset, rotary, slopes_N, mask or AttentionMask(), dtype, device)


def rotary_tables(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim/2) of position · theta^(-2c/head_dim) (RoFormer, arXiv 2104.09864)."""
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
