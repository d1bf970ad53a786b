"""Text files and JSON lines, plain and compressed. A plain file is cut without reading all of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO

from data_pipeline.prepare.documents import Place, ReadOptions, Record, Skipped, decoded, json_record
from data_pipeline.prepare.files import File
from data_pipeline.prepare.pieces import PIECE_BYTES, Format, Piece


def cut_file(file: File, options: ReadOptions) -> Iterator[Piece]:
    """The file as one piece."""
    yield Piece(file, size=file.size or PIECE_BYTES)


def cut_text(file: File, options: ReadOptions) -> Iterator[Piece]:
    return cut_file(file, options) if options.document == "file" else cut_lines(file, options.document == "paragraph")


def cut_lines(file: File, paragraphs: bool) -> Iterator[Piece]:
    """Pieces that end at the end of a line, or with `paragraphs` after a blank line."""
    if not file.seekable:
        yield from _cut_stream(file, paragraphs)
        return
    assert file.size is not None
    start = 0
    with file.open() as stream:
        while start < file.size:
            stop = min(start + PIECE_BYTES, file.size)
            if stop < file.size:
                stream.seek(stop - 1)  # if a line ends exactly here, readline gives only its end
                stop += sum(map(len, _rest(stream, paragraphs))) - 1
            yield Piece(file, start, stop, size=stop - start)
            start = stop


def _cut_stream(file: File, paragraphs: bool) -> Iterator[Piece]:
    lines = 0
    with file.open_content() as stream:
        while data := _read(stream, PIECE_BYTES):
            rest = [] if data.endswith(b"\n") and not paragraphs else _rest(stream, paragraphs)
            data += b"".join(rest)
            yield Piece(file, data=data, line=lines, size=len(data))
            lines += data.count(b"\n")


def _rest(stream: IO[bytes], paragraphs: bool) -> list[bytes]:
    """What follows up to the end of a line, or with `paragraphs` of a blank one."""
    rest = [stream.readline()]
    while paragraphs and (line := stream.readline()):
        rest.append(line)
        if not line.strip():
            break
    return rest


def _read(stream: IO[bytes], size: int) -> bytes:
    """`size` bytes, fewer only at the end; decompressors may give fewer at a time."""
    parts: list[bytes] = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_file(piece: Piece, options: ReadOptions) -> Iterator[Record]:
    with piece.file.open_content() as stream:
        yield Record(decoded(stream.read()), Place(piece.file.path))


def read_text(piece: Piece, options: ReadOptions) -> Iterator[Record]:
    if options.document == "file":
        yield from read_file(piece, options)
        return
    with piece.open() as lines:
        for number, part in _paragraphs(lines) if options.document == "paragraph" else enumerate(lines, start=1):
            yield Record(decoded(part.rstrip(b"\r\n")), _place(piece, number))


def _paragraphs(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Runs of lines between blank ones, each with the number of its first line."""
    paragraph: list[bytes] = []
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield number - len(paragraph), b"".join(paragraph)
            paragraph = []
    if paragraph:
        yield number + 1 - len(paragraph), b"".join(paragraph)


def read_json_lines(piece: Piece, options: ReadOptions) -> Iterator[Record]:
    with piece.open() as lines:
        for number, line in enumerate(lines, start=1):
            text = decoded(line)
            if text is Skipped.EMPTY:
                continue  # a blank line is no document
            place = _place(piece, number)
            yield Record(text, place) if isinstance(text, Skipped) else json_record(text, options, place)


def _place(piece: Piece, number: int) -> Place:
    return Place(piece.file.path, "line", piece.line + number, piece.start)


STDLIB = Format(cut_file, read_file)
TEXT = Format(cut_text, read_text)
JSON_LINES = Format(lambda file, options: cut_lines(file, False), read_json_lines)
