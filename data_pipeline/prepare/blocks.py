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
from typing import Any, Literal

import numpy as np

from configs.durable import sync
from configs.errors import UserError
from data_pipeline.prepare.documents import Copy, Place, ReadOptions, Record, Skipped
from data_pipeline.prepare.pieces import PIECE_BYTES, Piece
from data_pipeline.prepare.sources import Source

NAMED = 5  # skipped documents that are named for each reason
BLOCK_FORMAT = 2  # of block files
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
    places: dict[Skipped, list[Place | Copy]]

    @classmethod
    def of(cls, reasons: Sequence[Skipped]) -> Skips:
        return cls(dict.fromkeys(reasons, 0), {reason: [] for reason in reasons})

    def add(self, record: Record) -> None:
        assert isinstance(record.text, Skipped)
        self.counts[record.text] += 1
        if len(self.places[record.text]) < NAMED:
            self.places[record.text].append(record.place)

    def extend(self, others: Skips) -> None:
        """Add those of later documents. Reasons that are new come last."""
        for reason, count in others.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.places[reason] = (self.places.get(reason, []) + others.places[reason])[:NAMED]

    def lines(self) -> Iterator[str]:
        """For each reason how many, and the first ones by name."""
        for reason, count in self.counts.items():
            named = ", ".join(map(str, self.places[reason])) + (" …" if count > NAMED else "")
            yield f"{count:,} {reason.value}" + (f": {named}" if count else "")


class Places:
    """Where the documents of a block stand, in a few bytes for each."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, Literal["line", "row", "file"], int], int] = {}
        self._part_of: list[int] = []
        self._numbers: list[int] = []
        self._identifiers: list[str | None] = []

    def add(self, place: Place) -> None:
        self._part_of.append(self._parts.setdefault((place.path, place.unit, place.start), len(self._parts)))
        self._numbers.append(place.number)
        self._identifiers.append(place.identifier)

    def arrays(self) -> dict[str, Any]:
        """What `read` makes a place of."""
        known = any(identifier is not None for identifier in self._identifiers)
        return {
            "place_parts": _json_bytes(list(self._parts)),
            "place_part_of": np.array(self._part_of, dtype=np.uint32),
            "place_numbers": np.array(self._numbers, dtype=np.int64),
            "place_identifiers": _json_bytes(self._identifiers if known else []),
        }

    @staticmethod
    def read(file: BlockFile, document: int) -> Place:
        parts, part_of, numbers, identifiers = file.read("place_parts", "place_part_of", "place_numbers", "place_identifiers")
        path, unit, start = _from_json(parts)[part_of[document]]
        known = _from_json(identifiers)
        return Place(path, unit, int(numbers[document]), start, known[document] if known else None)


def _json_bytes(tree: Any) -> np.ndarray:
    """JSON as an array. Paths may hold bytes that are not UTF-8."""
    return np.frombuffer(json.dumps(tree).encode(errors="surrogateescape"), np.uint8)


def _from_json(content: np.ndarray) -> Any:
    return json.loads(content.tobytes().decode(errors="surrogateescape"))


@dataclass(frozen=True)
class Encoded:
    """The documents of a block, in input order."""

    source: int
    ids: np.ndarray  # of all documents, each with the id of the end of a document
    lengths: np.ndarray  # int32 [documents]: ids of each
    splits: np.ndarray  # uint8 [documents]
    sizes: np.ndarray  # int64 [documents]: bytes of UTF-8
    digests: np.ndarray  # uint8 [documents, 16]: a hash of each text
    places: Places
    skips: Skips
    signatures: np.ndarray | None = None  # uint32 [documents, PERMUTATIONS], if near duplicates are asked for
    bands: np.ndarray | None = None  # uint64 [bands, documents]: a hash of each band of these


class BlockFile:
    """The result of a block on disk. Arrays are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, encoded: Encoded) -> None:
        """Appear complete or not at all, also if processes write the same block at once."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        counts = {reason.name: count for reason, count in encoded.skips.counts.items()}
        places = {reason.name: list(map(astuple, places)) for reason, places in encoded.skips.places.items()}
        signed: dict[str, Any] = {}
        if encoded.signatures is not None and encoded.bands is not None:
            signed = {"signatures": encoded.signatures} | {f"band{number}": keys for number, keys in enumerate(encoded.bands)}
        with partial.open("wb") as file:
            np.savez(
                file,
                record=_json_bytes({"source": encoded.source, "counts": counts, "places": places}),
                ids=encoded.ids,
                lengths=encoded.lengths,
                splits=encoded.splits,
                sizes=encoded.sizes,
                digests=encoded.digests,
                **encoded.places.arrays(),
                **signed,
            )
        sync(partial)
        partial.replace(self.path)

    def exists(self) -> bool:
        return self.path.is_file()

    def read(self, *names: str) -> list[np.ndarray]:
        """Arrays by the names that `save` gives them. UserError if the file is damaged."""
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

    def place(self, document: int) -> Place:
        """Where a document of the block stands."""
        return Places.read(self, document)

    def _record(self) -> dict[str, Any]:
        return _from_json(self.read("record")[0])
