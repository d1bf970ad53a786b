"""A stream as samples, and the position from which it goes on exactly where it stood. Torch-free.

The documents of a stream come in the order of its units, in blocks that are shuffled. Each is its tokens and an end of
document; all of them, one after the other and pass after pass, are cut into samples of L + 1 tokens, of which adjacent ones
share one: sample j is the tokens j·L to (j + 1)·L.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from configs.errors import UserError
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.stream.documents import documents
from data_pipeline.stream.units import Share

Encode = Callable[[str], np.ndarray]  # a document with its end


class StreamEndError(Exception):
    """A stream has been read as often as it may be."""


class Position(NamedTuple):
    """Where the next sample of a stream begins, and what came before it."""

    passes: int = 0  # that are complete
    unit: int = 0  # where the block of the sample's first document begins: the stream's unit, and the place in it
    first: int = 0
    second: int = 0
    block: int = 0  # the number of this block in the pass
    taken: int = 0  # documents of the block before that one
    token: int = 0  # of that document, with which the sample begins
    documents: int = 0  # before that one, in all passes
    text_bytes: int = 0  # of these
    samples: int = 0

    @classmethod
    def of(cls, numbers: np.ndarray) -> Position:
        """From what `numbers` gave."""
        return cls(*numbers.tolist())

    def numbers(self) -> np.ndarray:
        """int64 [FIELDS]."""
        return np.array(self, np.int64)


FIELDS = len(Position._fields)


@dataclass(frozen=True)
class StreamRules:
    """What, beside its share of the text, decides the samples of each stream."""

    options: ReadOptions
    sequence_length: int
    seed: int
    block: int  # documents that are shuffled together
    passes: int  # how often a stream may be read


class Stream:
    """The samples of one stream from a position on."""

    def __init__(self, number: int, share: Share, rules: StreamRules, encode: Encode, start: Position) -> None:
        self._number, self._share, self._rules, self._encode = number, share, rules, encode
        self._samples = start.samples
        self._documents = self._texts(start)
        self._at = start  # of the document that the next sample begins in
        self._tokens = np.zeros(0, np.uint32)  # of that document; none before the first sample

    def sample(self) -> tuple[np.ndarray, Position]:
        """The next sample, uint32 [L + 1], and the position after it. StreamEndError, or UserError if there is none."""
        missing, parts = self._rules.sequence_length + 1, list[np.ndarray]()
        at, tokens = self._at, self._tokens
        if not tokens.size:
            at, tokens = self._next()
        start = at.token
        while True:
            parts.append(tokens[start : start + missing])
            missing, start = missing - parts[-1].size, start + parts[-1].size
            if missing == 0:
                break
            at, tokens = self._next()
            start = 0
        self._samples += 1
        self._at, self._tokens = at._replace(token=start - 1, samples=self._samples), tokens
        return np.concatenate(parts), self._at

    def _next(self) -> tuple[Position, np.ndarray]:
        at, text = next(self._documents)
        return at, self._encode(text)

    def _texts(self, at: Position) -> Iterator[tuple[Position, str]]:
        """The documents from a position on, each with its own."""
        while at.passes < self._rules.passes:
            read = documents(self._share, self._rules.options, at.unit, at.first, at.second)
            while block := list(islice(read, max(1, self._rules.block))):
                order = self._order(at, len(block))
                for place in range(at.taken, len(block)):
                    text = block[order[place]].text
                    yield at._replace(taken=place), text
                    at = at._replace(token=0, documents=at.documents + 1, text_bytes=at.text_bytes + len(text.encode()))
                last = block[-1]
                at = at._replace(unit=last.unit, first=last.first, second=last.second, block=at.block + 1, taken=0)
            if at.block == 0:
                raise UserError(f"data.stream: stream {self._number} has no document in {self._words()}")
            at = at._replace(passes=at.passes + 1, unit=0, first=0, second=0, block=0)
        raise StreamEndError

    def _order(self, at: Position, size: int) -> np.ndarray:
        if size < 2:
            return np.arange(size)
        text = f"stream {self._number}, pass {at.passes}, block {at.block}, seed {self._rules.seed}"
        digest = hashlib.sha256(text.encode()).digest()
        return np.random.RandomState(int.from_bytes(digest[:4])).permutation(size)  # the same in all versions of NumPy

    def _words(self) -> str:
        units, part = self._share.units, self._share
        whole = units[0].name if len(units) == 1 else f"its {len(units):,} files, from {units[0].name} on"
        shared = f", of which it reads part {part.part + 1} of {part.parts}; set data.stream.shards lower" * (part.parts > 1)
        return whole + shared
