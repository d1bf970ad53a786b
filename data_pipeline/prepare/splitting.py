"""Choose each document's split, and the text that trains the tokenizer, by a hash of the text.

So neither depends on the order of documents, on files or on workers, and equal documents land in the same split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import NamedTuple

PIECE = 65536  # characters; a document longer than this enters the tokenizer's sample in pieces
LONGEST_RUN = 256  # characters of one kind without a break that the tokenizer is trained on as they are
LONG_SHARE = 8  # at most 1/LONG_SHARE of the sample are longer runs
# Runs that GPT-2's pattern keeps as one word. Training takes time in proportion to the words that differ, and no two runs of
# text without spaces are equal.
_LONG_RUN = re.compile(
    rf"[^\W\d_]{{{LONGEST_RUN + 1},}}|\d{{{LONGEST_RUN + 1},}}|(?:[^\w\s]|_){{{LONGEST_RUN + 1},}}|\s{{{LONGEST_RUN + 1},}}"
)


class Splitter:
    def __init__(self, ratios: Sequence[float], seed: int) -> None:
        """`ratios` has a share for each split; their sum may be anything."""
        total = sum(ratios)
        self._bounds = [round(bound / total * 2**64) for bound in accumulate(ratios)]
        self._salt = seed.to_bytes(8, "little")

    def split_of(self, text: bytes) -> int:
        """Index into `ratios`; never one with share 0."""
        place = int.from_bytes(blake2b(text, digest_size=8, salt=self._salt, person=b"split").digest(), "little")
        return next(split for split, bound in enumerate(self._bounds) if place < bound)


class Extract(NamedTuple):
    """A piece of a text that may enter a sample."""

    place: int  # a hash: those below a bound are kept
    bytes: int
    text: str


def extracts(texts: Iterable[str], seed: int, bound: int = 2**64) -> Iterator[Extract]:
    """All `texts` in pieces, without those whose hash is not below `bound`."""
    for text in texts:
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            data = piece.encode()
            place = int.from_bytes(blake2b(data, digest_size=8, salt=seed.to_bytes(8, "little"), person=b"sample").digest())
            if place < bound:
                yield Extract(place, len(data), piece)


class Sample:
    """Pieces across all texts: everything up to `limit` UTF-8 bytes, of longer input about half of `limit` or more.

    `limit` bounds the memory: while the pieces exceed it, `bound` on their hashes is halved. What is kept in the end does not
    depend on the moments at which that happens.
    """

    def __init__(self, limit: int, each_once: bool = False) -> None:
        """`each_once` keeps only the first of equal pieces."""
        self.bound = 2**64
        self._limit = limit
        self._kept: list[Extract] = []
        self._total = 0
        self._seen: set[int] | None = set() if each_once else None

    def add(self, pieces: Iterable[Extract]) -> None:
        for piece in pieces:
            if piece.place >= self.bound or (self._seen is not None and piece.place in self._seen):
                continue
            if self._seen is not None:
                self._seen.add(piece.place)
            self._kept.append(piece)
            self._total += piece.bytes
            while self._total > self._limit:
                self.bound //= 2
                self._kept = [entry for entry in self._kept if entry.place < self.bound]
                self._total = sum(entry.bytes for entry in self._kept)

    def texts(self) -> list[str]:
        return [piece.text for piece in self._kept]


def sample_texts(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """The `Sample` of `texts`."""
    sample = Sample(limit)
    sample.add(extracts(texts, seed))
    return sample.texts()


def shorten_runs(texts: Sequence[str], seed: int) -> list[str]:
    """`texts` with runs over LONGEST_RUN characters cut, so that training on text without spaces costs no more than on prose.

    If the runs are more than 1/LONG_SHARE of the text, only some parts of them are kept, chosen by a hash.
    """
    total = sum(map(len, texts))
    long = sum(len(run.group()) for text in texts for run in _LONG_RUN.finditer(text))
    bound = 2**64 if long * LONG_SHARE <= total else 2**64 * total // (LONG_SHARE * long)
    salt = seed.to_bytes(8, "little")

    def shorten(run: re.Match[str]) -> str:
        parts = [run.group()[start : start + LONGEST_RUN] for start in range(0, len(run.group()), LONGEST_RUN)]
        hashes = [blake2b(part.encode(), digest_size=8, salt=salt, person=b"runs").digest() for part in parts]
        kept = [part for part, place in zip(parts, hashes, strict=True) if int.from_bytes(place) < bound]
        return " ".join(kept)

    return [_LONG_RUN.sub(shorten, text) for text in texts]
