"""Attention masks: which keys each query sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Which of T keys each of S queries sees; the queries are the last S of the T tokens.

    `causal`: no later key. `window`: of the earlier keys only the last `window` - 1, and itself. `valid_BT` (bool): False on
    padding, which no query sees. `documents_BT` (integers): a query sees the keys of its own document only. A query that sees
    no key at all attends to nothing: its heads are zero (MHE: e^V alone).
    """

    causal: bool = True
    valid_BT: Tensor | None = None
    documents_BT: Tensor | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal:
            raise ValueError("a window ends at the query, so its mask is causal")
        if self.valid_BT is not None and self.valid_BT.dtype != torch.bool:
            raise TypeError(f"valid_BT must be bool, not {self.valid_BT.dtype}")
        if self.documents_BT is not None and self.documents_BT.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"documents_BT must be int32 or int64, not {self.documents_BT.dtype}")

    @property
    def is_plain(self) -> bool:
        """Whether distance alone decides: neither padding nor documents."""
        return self.valid_BT is None and self.documents_BT is None

    @property
    def restarts_BT(self) -> Tensor | None:
        """The position of each token in its own document, where these are kept apart."""
        return None if self.documents_BT is None else positions_in_documents(self.documents_BT)

    def between(self, queries: range, keys: range, device: torch.device) -> Tensor | None:
        """(B or 1, 1, S, T), True where one of these queries sees one of these keys; None where each sees all.

        Both are numbered among the T tokens.
        """
        parts = []
        later = self.causal and queries.start < keys.stop - 1  # whether any key is later than a query
        too_early = self.window is not None and queries.stop - self.window > keys.start
        if later or too_early:
            of_queries_S1 = torch.arange(queries.start, queries.stop, device=device)[:, None]
            of_keys_T = torch.arange(keys.start, keys.stop, device=device)
            parts.append((of_keys_T <= of_queries_S1)[None, None])
            if self.window is not None:
                parts.append((of_keys_T > of_queries_S1 - self.window)[None, None])
        if self.valid_BT is not None:
            parts.append(self.valid_BT[:, None, None, keys.start : keys.stop])
        if self.documents_BT is not None:
            of_queries, of_keys = (self.documents_BT[:, part.start : part.stop] for part in (queries, keys))
            parts.append(of_queries[:, None, :, None] == of_keys[:, None, None, :])
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
