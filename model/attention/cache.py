"""Keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class LayerCache:
    """K and V of one layer in (batch, kv_heads, capacity, head_dim) tensors that are allocated once and filled in order."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.k_BKSD = torch.empty(shape, dtype=dtype, device=device)
        self.v_BKSD = torch.empty(shape, dtype=dtype, device=device)

    def append(self, k_BKSD: Tensor, v_BKSD: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Write S tokens at `offset`; return views of all offset + S."""
        end = offset + k_BKSD.shape[2]
        if end > self.k_BKSD.shape[2]:
            raise ValueError(f"the cache holds {self.k_BKSD.shape[2]} tokens, not {end}")
        self.k_BKSD[:, :, offset:end] = k_BKSD
        self.v_BKSD[:, :, offset:end] = v_BKSD
        return self.k_BKSD[:, :, :end], self.v_BKSD[:, :, :end]


@dataclass
class Cache:
    """The caches of all layers and the number of tokens in each."""

    layers: list[LayerCache]
    length: int = 0
