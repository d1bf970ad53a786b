"""Attention masks: which keys each query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    @property
    def restarts_BT(self) -> Tensor | None:
        """The position of each token in its own document, where these are kept apart."""
        return None if self.documents_BT is None else positions_in_documents(self.documents_BT)

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


def positions_in_documents(documents_BT: Tensor) -> Tensor:
    """The position of each token in its document, (B, T), from the documents' numbers, which rise along a sequence."""
    places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return places_T - (places_T * begins_BT).cummax(dim=1).values
