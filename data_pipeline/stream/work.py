"""What a worker process does: read and tokenize the next samples of one of its streams. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from configs.errors import UserError
from data_pipeline.stream.samples import FIELDS, Position, Stream, StreamEndError, StreamRules
from data_pipeline.stream.units import Share

if TYPE_CHECKING:
    from data_pipeline.prepare.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """The next samples of a stream, and what keeps it from having more, if anything does."""

    stream: int
    samples: np.ndarray  # [samples, L + 1]
    positions: np.ndarray  # int64 [samples, FIELDS]: after each
    ended: bool = False
    error: str | None = None  # for the user


@dataclass
class Reading:
    """Streams from their positions on. Each process makes its tokenizer and opens its files when it is first asked."""

    tokenizer: str  # its JSON
    fast: bool
    rules: StreamRules
    shares: Mapping[int, Share]
    starts: Mapping[int, Position]
    _opened: dict[int, Stream] = field(default_factory=dict)
    _stopped: dict[int, Chunk] = field(default_factory=dict)

    @cached_property
    def _encoder(self) -> Tokenizer:
        from data_pipeline.prepare.tokenizer import Tokenizer  # only workers need its packages

        return Tokenizer(self.tokenizer, "the tokenizer", fast=self.fast)

    def __call__(self, task: tuple[int, int]) -> Chunk:
        """So many samples of a stream, fewer if it ends."""
        number, count = task
        if number in self._stopped:
            return self._stopped[number]
        if number not in self._opened:
            self._opened[number] = Stream(number, self.shares[number], self.rules, self._encode, self.starts[number])
        samples: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        stop: dict[str, object] = {}
        try:
            for _ in range(count):
                sample, position = self._opened[number].sample()
                samples.append(sample)
                positions.append(position.numbers())
        except StreamEndError:
            stop = {"ended": True}
        except UserError as error:
            stop = {"error": str(error)}
        length = self.rules.sequence_length + 1
        tokens = np.array(samples, self._encoder.dtype).reshape(-1, length)
        chunk = Chunk(number, tokens, np.array(positions, np.int64).reshape(-1, FIELDS), **stop)  # type: ignore[arg-type]
        if stop:
            self._stopped[number] = Chunk(number, tokens[:0], chunk.positions[:0], **stop)  # type: ignore[arg-type]
        return chunk

    def _encode(self, text: str) -> np.ndarray:
        return np.append(self._encoder.encode_array(text), np.uint32(self._encoder.end_of_document))
