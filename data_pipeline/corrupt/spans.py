"""Span corruption: each of some spans of a text becomes one sentinel, and the spans are what follows (T5, arXiv 1910.10683)."""

from __future__ import annotations

import numpy as np

from configs.schema import SpansConfig


def noise_mask(length: int, corrupted: int, spans: int, draw: np.random.RandomState) -> np.ndarray:
    """Which of `length` tokens are corrupted, bool: `corrupted` of them in so many spans, none beside another.

    The first token is kept and the last one corrupted, as in T5. All ways to divide the tokens are equally likely.
    """
    kept, lost = _division(length - corrupted, spans, draw), _division(corrupted, spans, draw)
    return np.repeat(np.tile([False, True], spans), np.stack([kept, lost], axis=1).ravel())


def _division(tokens: int, parts: int, draw: np.random.RandomState) -> np.ndarray:
    """`tokens` in so many parts of at least one, int64 [parts]."""
    cuts = np.sort(draw.permutation(tokens - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [tokens]]))


def corrupt(tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an encoder reads and a decoder writes.

    inputs: the tokens, each span of `noise` replaced by the next of the `sentinels`. targets: for each span its sentinel and
    its tokens. For n tokens, c of them in k spans, they have n - c + k and c + k tokens.
    """
    begins = noise & ~np.concatenate([[False], noise[:-1]])
    marked = np.where(begins, sentinels[np.maximum(begins.cumsum() - 1, 0)], tokens)
    spans = np.flatnonzero(begins[noise])  # where each begins in the targets, without sentinels
    return marked[~noise | begins], np.insert(tokens[noise], spans, sentinels[: len(spans)])


class SpanCorruption:
    """Corrupts samples of one length by the rules of a run."""

    def __init__(self, rules: SpansConfig, length: int, special: dict[str, int]) -> None:
        self.length, (self.corrupted, self.spans) = length, rules.counts(length)
        self.sentinels = np.array([special[name] for name in sentinel_names(rules, length)])

    def __call__(self, tokens: np.ndarray, draw: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """`corrupt` of drawn spans; inputs and targets of all samples have the same lengths."""
        return corrupt(tokens, noise_mask(self.length, self.corrupted, self.spans, draw), self.sentinels)


def sentinel_names(rules: SpansConfig, length: int) -> list[str]:
    """The texts of the sentinels that samples of `length` tokens need."""
    return [rules.sentinel.replace("{}", str(number)) for number in range(rules.counts(length)[1])]
