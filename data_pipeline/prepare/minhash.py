"""MinHash signatures of documents, by datasketch, and the bands by which documents that resemble each other meet.

A document is the set of its shingles: all runs of SHINGLE words. How alike two documents are is the Jaccard similarity of
these sets, which the share of equal values in their signatures estimates.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from configs.errors import UserError

PERMUTATIONS = 128  # values of a signature, 4 bytes each; the estimate's standard error is at most 1 / (2 √128) = 0.044
SHINGLE = 5  # words
RECALL = 0.95  # chance that two documents exactly as alike as the threshold meet in a band; above it the chance is higher
LOWEST = 0.5  # threshold; below it too many documents would meet
_SHINGLES_AT_ONCE = 4096
_TEXT_AT_ONCE = 1 << 20  # characters; a word across a bound counts as two
# Scripts without spaces between words, each character of which is a word: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
_ASCII_WORDS = bytes(byte if chr(byte).isalnum() or chr(byte) == "_" else 32 for byte in range(128)) + bytes(128)
_STEP, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # odd, bits without pattern


@dataclass(frozen=True)
class Resemblance:
    """From which estimated similarity on a document is a near duplicate, and what decides signatures and bands besides."""

    threshold: float
    rows: int  # values of a band
    library: str

    @classmethod
    def of(cls, threshold: float) -> Resemblance:
        """UserError if the library is not installed."""
        return cls(threshold, _rows(threshold), f"datasketch {_version()}")

    @property
    def bands(self) -> int:
        return PERMUTATIONS // self.rows

    def keys(self, signatures: np.ndarray) -> np.ndarray:
        """A hash of each band of `signatures` [documents, PERMUTATIONS], uint64 [bands, documents]."""
        used = signatures[:, : self.bands * self.rows].astype(np.uint64).reshape(len(signatures), self.bands, self.rows)
        keys = np.zeros((len(signatures), self.bands), dtype=np.uint64)
        for row in range(self.rows):
            keys = _mixed(keys * _STEP + used[:, :, row])
        return np.ascontiguousarray(keys.T)


def _rows(threshold: float) -> int:
    """The most values in a band with which RECALL is reached: the more, the fewer documents meet for nothing."""
    enough = (rows for rows in range(PERMUTATIONS, 1, -1) if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL)
    return next(enough, 1)


def _version() -> str:
    try:
        return importlib.metadata.version("datasketch")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"--near-duplicates: needs the package datasketch, which is not installed for {sys.executable}; "
            "pip install 'manyheads[data]', or run `make install`"
        ) from error


class Signer:
    """Makes signatures."""

    def __init__(self) -> None:
        from datasketch import MinHash  # type: ignore[import-untyped]  # here: it loads SciPy, which takes a second

        self._minhash = MinHash(PERMUTATIONS, hashfunc=int, scheme="affine32")

    def sign(self, text: str) -> np.ndarray:
        """The signature of `text`, uint32 [PERMUTATIONS]; equal for equal sets of shingles."""
        self._minhash.clear()
        found = np.unique(shingles(text))
        for start in range(0, found.size, _SHINGLES_AT_ONCE):
            self._minhash.update_batch(found[start : start + _SHINGLES_AT_ONCE].tolist())
        return self._minhash.digest()


def shingles(text: str) -> np.ndarray:
    """A hash of each run of SHINGLE words, uint32; of a shorter text one of all its words. Letter case does not count.

    A text without any word is one word.
    """
    lower = text.lower()
    parts = [_word_hashes(lower[start : start + _TEXT_AT_ONCE]) for start in range(0, len(lower), _TEXT_AT_ONCE)]
    words = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    if words.size == 0:
        words = np.array([crc32(lower.encode())], np.uint64)
    width = min(SHINGLE, words.size)
    hashes = np.zeros(words.size - width + 1, dtype=np.uint64)
    for place in range(width):
        hashes = hashes * _STEP + words[place : place + hashes.size]
    return (_mixed(hashes) >> np.uint64(32)).astype(np.uint32)


def _word_hashes(text: str) -> np.ndarray:
    # Of ASCII the same words, four times as fast.
    spaced = text.encode().translate(_ASCII_WORDS) if text.isascii() else "\n".join(_WORD.findall(text)).encode()
    words = spaced.split()
    return np.fromiter(map(crc32, words), np.uint64, len(words))


def _mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 after which every bit depends on all lower ones and some higher ones."""
    values = (values ^ (values >> np.uint64(29))) * _MIX
    return values ^ (values >> np.uint64(32))
