"""A block: some pieces of one source, read and encoded together. Its result is a file, so that finished ones are never redone.

Blocks have numbers in input order. The same input and options give the same blocks, on every machine.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.durable import sync
from configs.errors import UserError
from data_pipeline.prepare.documents import Place, ReadOptions, Record, Skipped
from data_pipeline.prepare.pieces import PIECE_BYTES, Piece
from data_pipeline.prepare.sources import Source

NAMED = 5  # skipped documents that are named for each reason
_PIECES = 1000  # most in a block: small files


@dataclass(frozen=True)
class Block:
    number: int
    source: int  # index of the source
    pieces: tuple[Piece, ...]


def cut_blocks(sources: Sequence[Source], options: ReadOptions) -> Iterator[Block]:
    number = 0
    for index, source in enumerate(sources):
        pieces: list[Piece] = []
        size = 0
        for piece in source.pieces(options):
            if pieces and (size + piece.size > PIECE_BYTES or len(pieces) == _PIECES):
                yield Block(number, index, tuple(pieces))
                number, pieces, size = number + 1, [], 0
            pieces.append(piece)
            size += piece.size
        if pieces:
            yield Block(number, index, tuple(pieces))
            number += 1


@dataclass
class Skips:
    """How many documents were skipped for each reason, and where the first ones are."""

    counts: dict[Skipped, int]
    places: dict[Skipped, list[Place]]

    @classmethod
    def of(cls, reasons: Sequence[Skipped]) -> Skips:
        return cls(dict.fromkeys(reasons, 0), {reason: [] for reason in reasons})

    def add(self, record: Record) -> None:
        assert isinstance(record.text, Skipped)
        self.counts[record.text] += 1
        if len(self.places[record.text]) < NAMED:
            self.places[record.text].append(record.place)

    def extend(self, others: Skips) -> None:
        for reason, count in others.counts.items():
            self.counts[reason] += count
            self.places[reason] = (self.places[reason] + others.places[reason])[:NAMED]

    def lines(self) -> Iterator[str]:
        """For each reason how many, and the first ones by name."""
        for reason, count in self.counts.items():
            named = ", ".join(map(str, self.places[reason])) + (" …" if count > NAMED else "")
            yield f"{count:,} {reason.value}" + (f": {named}" if count else "")


@dataclass(frozen=True)
class Encoded:
    """The documents of a block, in input order."""

    source: int
    ids: np.ndarray  # of all documents, each with the id of the end of a document
    lengths: np.ndarray  # int32 [documents]: ids of each
    splits: np.ndarray  # uint8 [documents]
    sizes: np.ndarray  # int64 [documents]: bytes of UTF-8
    digests: np.ndarray  # uint8 [documents, 16]: a hash of each text
    skips: Skips


class BlockFile:
    """The result of a block on disk. Arrays are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, encoded: Encoded) -> None:
        """Appear complete or not at all, also if processes write the same block at once."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        counts = {reason.name: count for reason, count in encoded.skips.counts.items()}
        places = {reason.name: list(map(astuple, places)) for reason, places in encoded.skips.places.items()}
        record = json.dumps({"source": encoded.source, "counts": counts, "places": places})
        with partial.open("wb") as file:
            np.savez(
                file,
                record=np.frombuffer(record.encode(errors="surrogateescape"), np.uint8),
                ids=encoded.ids,
                lengths=encoded.lengths,
                splits=encoded.splits,
                sizes=encoded.sizes,
                digests=encoded.digests,
            )
        sync(partial)
        partial.replace(self.path)

    def exists(self) -> bool:
        return self.path.is_file()

    def read(self, *names: str) -> list[np.ndarray]:
        """Arrays by the names that `Encoded` gives them. UserError if the file is damaged."""
        try:
            with np.load(self.path) as arrays:
                return [arrays[name] for name in names]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); delete it and run the command again") from error

    def source(self) -> int:
        return int(self._record()["source"])

    def skips(self) -> Skips:
        record = self._record()
        return Skips(
            {Skipped[name]: count for name, count in record["counts"].items()},
            {Skipped[name]: [Place(*fields) for fields in places] for name, places in record["places"].items()},
        )

    def _record(self) -> dict[str, Any]:
        (content,) = self.read("record")
        return json.loads(content.tobytes().decode(errors="surrogateescape"))
