"""A piece: the part of a file that one process reads by itself. Pieces of a file, in order, hold its documents in order."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from data_pipeline.prepare.documents import ReadOptions, Record, Skipped
from data_pipeline.prepare.files import File

PIECE_BYTES = 16 << 20  # about as much text; the same input is always cut in the same places


@dataclass(frozen=True)
class Piece:
    file: File
    start: int = 0  # bytes or rows of the file, from `start` up to `stop`
    stop: int = 0
    data: bytes | None = None  # what the bytes are, if the reader cannot find them by itself
    line: int = 0  # with `data`: lines of the file before it
    records: tuple[Record, ...] | None = None  # the documents themselves, if a process cannot read them by itself
    size: int = 0  # about how much text there is

    def open(self) -> IO[bytes]:
        """The bytes of the piece, of any file but one that is read by rows."""
        if self.data is not None:
            return io.BytesIO(self.data)
        with self.file.open() as file:
            file.seek(self.start)
            return io.BytesIO(file.read(self.stop - self.start))


def pieces_of_records(file: File, records: Iterable[Record]) -> Iterator[Piece]:
    """Documents that only one process can read, as pieces of about PIECE_BYTES; the last one may be empty."""
    kept: list[Record] = []
    size = 0
    for record in records:
        kept.append(record)
        size += 0 if isinstance(record.text, Skipped) else len(record.text)
        if size >= PIECE_BYTES:
            yield Piece(file, records=tuple(kept), size=size)
            kept, size = [], 0
    yield Piece(file, records=tuple(kept), size=size)


@dataclass(frozen=True)
class Format:
    """How files of one kind are cut into pieces, in one process, and how a piece is read, in any process."""

    cut: Callable[[File, ReadOptions], Iterator[Piece]]
    read: Callable[[Piece, ReadOptions], Iterator[Record]]
