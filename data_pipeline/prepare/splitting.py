"""Choose each document's split, and the text that trains the tokenizer, by a hash of the text.

So neither depends on the order of documents, on files or on workers, and equal documents land in the same split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate

PIECE = 65536  # characters; a document longer than this enters the tokenizer's sample in pieces


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


def sample_texts(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """Sample pieces across all `texts`: everything up to `limit` UTF-8 bytes, of longer input about half of `limit` or more.

    `limit` bounds the memory: each piece has a hash, and while the pieces exceed `limit`, the bound on hashes is halved.
    """
    kept: list[tuple[int, int, str]] = []  # hash, bytes, piece
    bound, total = 2**64, 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            data = piece.encode()
            place = int.from_bytes(blake2b(data, digest_size=8, salt=seed.to_bytes(8, "little"), person=b"sample").digest())
            if place >= bound:
                continue
            kept.append((place, len(data), piece))
            total += len(data)
            while total > limit:
                bound //= 2
                kept = [entry for entry in kept if entry[0] < bound]
                total = sum(size for _, size, _ in kept)
    return [piece for _, _, piece in kept]
