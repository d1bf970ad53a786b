"""The documents of a unit from any place in it. Torch-free.

A place is two numbers. JSON lines: bytes of the content before the next line, and lines. A shard of the hub: 0, and rows. All
other formats: the piece, as `prepare` cuts it, and documents of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import IO, Any, NamedTuple

from configs.errors import UserError
from data_pipeline.prepare import hub
from data_pipeline.prepare.documents import Place, ReadOptions, Record, Skipped, decoded, json_record, object_record
from data_pipeline.prepare.files import File, reading
from data_pipeline.prepare.lines import JSON_LINES
from data_pipeline.stream.units import Share, Unit, said_of_stream

_SKIPPED_AT_ONCE = 1 << 20  # bytes


class Read(NamedTuple):
    """A document, and the place after it."""

    text: str
    unit: int
    first: int
    second: int


def documents(share: Share, options: ReadOptions, unit: int = 0, first: int = 0, second: int = 0) -> Iterator[Read]:
    """Those of a share from a place in its unit number `unit` on, without unusable ones.

    UserError names the file, and where it can the line, that cannot be read or is not of the form that is expected.
    """
    with said_of_stream():
        for number in range(unit, len(share.units)):
            place = (first, second) if number == unit else (0, 0)
            for text, after in _of_unit(share, share.units[number], options, *place):
                if isinstance(text, str):
                    yield Read(text, number, *after)


def _of_unit(
    share: Share, unit: Unit, options: ReadOptions, first: int, second: int
) -> Iterator[tuple[str | Skipped, tuple[int, int]]]:
    """The texts of a share's part of a unit, each with the place after it."""
    if unit.shards:
        for row, record in _rows(unit, options, second):
            if row % share.parts == share.part:
                yield record.text, (0, row + 1)
    elif unit.source.format_of(unit.file) is JSON_LINES:
        for start, line, content in _lines(unit.file, first, second):
            if line % share.parts == share.part:
                yield _json_text(content, options, Place(unit.file.path, "line", line + 1)), (start + len(content), line + 1)
    else:
        for piece, number, record in _of_pieces(unit, options, first, second):
            if number % share.parts == share.part:
                yield record.text, (piece, number + 1)


def _json_text(content: bytes, options: ReadOptions, place: Place) -> str | Skipped:
    text = decoded(content)
    return text if isinstance(text, Skipped) else json_record(text, options, place).text


def _lines(file: File, start: int, line: int) -> Iterator[tuple[int, int, bytes]]:
    """Lines from number `line` on, which begins after `start` bytes of the content: where each begins, its number and it."""
    try:
        with reading(file.path), file.open_content() as stream:
            _skip(stream, file, start)
            for content in stream:
                yield start, line, content
                start, line = start + len(content), line + 1
    except UserError as error:
        raise UserError(f"{error} (after line {line:,})") from error


def _skip(stream: IO[bytes], file: File, size: int) -> None:
    if file.seekable:
        stream.seek(size)
        return
    while size > 0 and (part := stream.read(min(size, _SKIPPED_AT_ONCE))):
        size -= len(part)


def _of_pieces(unit: Unit, options: ReadOptions, first: int, second: int) -> Iterator[tuple[int, int, Record]]:
    """Documents from number `second` of piece `first` on: the piece's number, the document's in it, and it."""
    with reading(unit.file.path):
        pieces = enumerate(unit.source.format_of(unit.file).cut(unit.file, options))
        for number, piece in islice(pieces, first, None):
            records = enumerate(unit.source.read(piece, options))
            for place, record in islice(records, second if number == first else 0, None):
                yield number, place, record


def _rows(unit: Unit, options: ReadOptions, row: int) -> Iterator[tuple[int, Record]]:
    """Rows from number `row` on."""
    with hub.reading_hub(unit.name):
        rows = _opened(unit.file.path, options).shard(unit.shards, unit.shard)
        for number, content in enumerate(rows.skip(row) if row else rows, start=row):
            yield number, object_record(content, options, Place(unit.name, "row", number + 1))


@lru_cache(maxsize=16)
def _opened(given: str, options: ReadOptions) -> Any:
    """A data set of the hub, which is looked up once for all its shards."""
    return hub.opened(given, options)
