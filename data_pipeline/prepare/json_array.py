"""A .json file: an array of objects, read one object at a time, or JSON lines, told apart by the first character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

from configs.errors import UserError
from data_pipeline.prepare.documents import Place, ReadOptions, Record, object_record
from data_pipeline.prepare.files import File
from data_pipeline.prepare.lines import cut_lines, read_json_lines
from data_pipeline.prepare.pieces import Format, Piece, pieces_of_records

CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r\ufeff]*")


def cut(file: File, options: ReadOptions) -> Iterator[Piece]:
    with file.open_content() as stream:
        if not _begins_array(stream):
            yield from cut_lines(file, paragraphs=False)
            return
    with file.open_content() as stream:
        yield from pieces_of_records(file, _Elements(file.path, stream).records(options))


def _begins_array(stream: IO[bytes]) -> bool:
    while data := stream.read(4096):
        if text := data.removeprefix(codecs.BOM_UTF8).strip():
            return text.startswith(b"[")
    return False


class _Elements:
    """The elements of an array, without holding more of the file than the one that is being read."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        self._path, self._stream = path, stream
        # Bytes that are not UTF-8 become lone surrogates, for which their document is skipped.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._buffer, self._at, self._line = "", 0, 1
        self._ended = False

    def records(self, options: ReadOptions) -> Iterator[Record]:
        self._take("[")
        if self._next() == "]":
            self._take("]")
        else:
            while True:
                self._next()
                place = Place(self._path, "line", self._line + self._buffer.count("\n", 0, self._at))
                yield object_record(self._value(), options, place)
                if self._next() == "]":
                    break
                self._take(",")
            self._take("]")
        if self._next():
            raise self._error("something follows the array", self._at)

    def _fill(self) -> None:
        """Drop what has been read, and read as much again as is left: so a long element is parsed a few times only."""
        self._line += self._buffer.count("\n", 0, self._at)
        data = self._stream.read(max(CHUNK, len(self._buffer) - self._at))
        self._ended = not data
        self._buffer = self._buffer[self._at :] + self._utf8.decode(data, final=self._ended)
        self._at = 0

    def _next(self) -> str:
        """Skip white space; the character that follows, or "" at the end of the file."""
        while True:
            found = _SPACE.match(self._buffer, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._fill()

    def _take(self, expected: str) -> None:
        if (found := self._next()) != expected:
            raise self._error(f"{expected!r} is missing" if found else "the file ends within the array", self._at)
        self._at += 1

    def _value(self) -> object:
        while True:
            try:
                value, end = _decode(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:  # a number might go on in what is not read yet
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                in_string = error.msg.startswith("Unterminated string")
                if self._ended:
                    ends_here = in_string or error.pos >= len(self._buffer.rstrip())
                    raise self._error("the file ends within the array" if ends_here else error.msg, error.pos) from error
                if not in_string and error.pos < len(self._buffer) - 16:  # else what is not read yet may complete it
                    raise self._error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._error("nested too deeply", self._at) from error
            self._fill()

    def _error(self, reason: str, at: int) -> UserError:
        line = self._line + self._buffer.count("\n", 0, at)
        return UserError(
            f"{self._path}:{line}: not valid JSON ({reason}); a .json is one array of objects, or an object a line"
        )


def _decode(text: str, at: int) -> tuple[object, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more digits than Python converts
        return json.JSONDecoder(parse_int=float).raw_decode(text, at)


def read(piece: Piece, options: ReadOptions) -> Iterator[Record]:
    return iter(piece.records) if piece.records is not None else read_json_lines(piece, options)


JSON = Format(cut, read)
