"""Keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.variant import Cached


class LayerCache:
    """What a variant keeps of each token in one layer, as keys and as values, (batch, heads, tokens, width) each.

    Memory grows with the tokens seen, not the capacity: it doubles when full, so that each token is copied about once.
    """

    def __init__(self, batch: int, cached: Cached, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.k_BKSD = torch.empty((batch, cached.key_heads, 0, cached.key_width), dtype=dtype, device=device)
        self.v_BKSD = torch.empty((batch, cached.value_heads, 0, cached.value_width), dtype=dtype, device=device)

    def append(self, k_BKSD: Tensor, v_BKSD: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Write S tokens at `offset`; return views of all offset + S tokens."""
        end = offset + k_BKSD.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {end}")
        if end > self.k_BKSD.shape[2]:
            length = min(self.capacity, max(end, 2 * self.k_BKSD.shape[2]))
            self.k_BKSD, self.v_BKSD = (grown(old_BKSD, length, offset) for old_BKSD in (self.k_BKSD, self.v_BKSD))
        self.k_BKSD[:, :, offset:end] = k_BKSD
        self.v_BKSD[:, :, offset:end] = v_BKSD
        return self.k_BKSD[:, :, :end], self.v_BKSD[:, :, :end]

    def append_once(self, x_BNSD: Tensor, offset: int) -> Tensor:
        """Write S tokens of a tensor that is both K and V; return all offset + S tokens, (B, N, T, D).

        The first half of its heads is stored as keys, the second half as values. With an odd N the middle head is stored twice.
        """
        heads = x_BNSD.shape[1]
        half = (heads + 1) // 2
        first_BKTD, second_BKTD = self.append(x_BNSD[:, :half], x_BNSD[:, -half:], offset)
        return torch.cat([first_BKTD, second_BKTD[:, 2 * half - heads :]], dim=1)


def grown(old_BKSD: Tensor, length: int, filled: int) -> Tensor:
    """A copy with room for `length` tokens, of which the first `filled` are those of `old_BKSD`."""
    new_BKSD = old_BKSD.new_empty((*old_BKSD.shape[:2], length, old_BKSD.shape[3]))
    new_BKSD[:, :, :filled] = old_BKSD[:, :, :filled]
    return new_BKSD


@dataclass
class Cache:
    """The caches of all layers, the number of tokens in each, and the token ids if attention depends on them."""

    layers: list[LayerCache]
    length: int = 0
    tokens_BT: Tensor | None = None

    def append_tokens(self, tokens_BS: Tensor) -> Tensor:
        """Keep the tokens of this pass; return all (B, T)."""
        self.tokens_BT = tokens_BS if self.tokens_BT is None else torch.cat([self.tokens_BT, tokens_BS], dim=1)
        return self.tokens_BT
