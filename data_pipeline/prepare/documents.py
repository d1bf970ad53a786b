"""What a document is: its text or the reason why it is skipped, and the place that messages name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

from configs.errors import UserError

DocumentUnit = Literal["file", "paragraph", "line"]
DOCUMENT_UNITS: tuple[DocumentUnit, ...] = get_args(DocumentUnit)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Skipped(Enum):
    """Why a document is skipped; the manifest counts them."""

    NOT_UTF8 = "not UTF-8"
    EMPTY = "empty"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near duplicate"


@dataclass(frozen=True)
class ReadOptions:
    document: DocumentUnit = "file"  # what counts as one document in a .txt
    text_field: str = "text"  # the field or column with the text; a.b is field b of the object in field a
    id_field: str | None = None  # the field or column that names a document in messages
    min_characters: int = 0
    max_characters: int | None = None

    def reasons(self) -> list[Skipped]:
        """Those for which reading may skip a document."""
        chosen = {Skipped.TOO_SHORT: self.min_characters > 0, Skipped.TOO_LONG: self.max_characters is not None}
        return [Skipped.NOT_UTF8, Skipped.EMPTY, *(reason for reason, may in chosen.items() if may)]


@dataclass(frozen=True)
class Place:
    """Where a document stands. Of a part of a file that a worker reads by itself, lines are counted only if one is named."""

    path: str
    unit: Literal["line", "row", "file"] = "file"
    number: int = 0  # counted from 1, within the part
    start: int = 0  # bytes (unit line) of the file before the part, if they must still be counted
    identifier: str | None = None

    def __str__(self) -> str:
        named = "" if self.identifier is None else f" (id {self.identifier})"
        if self.unit == "file":
            return f"{self.path}{named}"
        if self.unit == "row":
            return f"{self.path}, row {self.number}{named}"
        try:
            return f"{self.path}:{self.number + _lines_before(self.path, self.start)}{named}"
        except Exception:  # the file is gone, or of another machine; stores raise errors of their own
            return f"{self.path}, line {self.number} after byte {self.start}{named}"


@dataclass(frozen=True)
class Copy:
    """A document that is left out, the one that it equals or resembles, and how similar they are, if they are not equal."""

    place: Place
    original: Place
    similarity: float | None = None

    def __str__(self) -> str:
        relation = "as" if self.similarity is None else f"{self.similarity:.2f} of"
        return f"{self.place} ({relation} {self.original})"


class Record(NamedTuple):
    """A text, or why there is none, at a place."""

    text: str | Skipped
    place: Place


def filtered(record: Record, options: ReadOptions) -> Record:
    """`record` with a reason in the place of its text if the text is shorter or longer than allowed."""
    if isinstance(record.text, Skipped):
        return record
    if len(record.text) < options.min_characters:
        return Record(Skipped.TOO_SHORT, record.place)
    if options.max_characters is not None and len(record.text) > options.max_characters:
        return Record(Skipped.TOO_LONG, record.place)
    return record


def decoded(data: bytes) -> str | Skipped:
    """UTF-8 bytes without a byte order mark as text."""
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError:
        return Skipped.NOT_UTF8
    return text if text.strip() else Skipped.EMPTY


def checked(value: object, what: Callable[[], str]) -> str | Skipped:
    """A text value that can be written as UTF-8 (JSON may hold half a surrogate pair); null counts as empty."""
    if value is None:
        return Skipped.EMPTY
    if not isinstance(value, str):
        raise UserError(f"{what()} holds {type(value).__name__}, not text; choose another with --text-field")
    if not value.strip():
        return Skipped.EMPTY
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return Skipped.NOT_UTF8
    return value


def json_record(line: str, options: ReadOptions, place: Place) -> Record:
    """The document of a line of JSON. UserError if it is not an object with the field of the text."""
    try:
        value = _loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise UserError(f"{place}: not valid JSON ({reason}); each line is one object") from error
    return object_record(value, options, place)


def object_record(value: object, options: ReadOptions, place: Place) -> Record:
    """The document of a JSON object. UserError if it is none, or lacks the field of the text or the id."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: holds {type(value).__name__}, not an object with the text in a field")
    if options.id_field is not None:
        place = replace(place, identifier=str(_field(value, options.id_field, "--id-field", place))[:100])
    text = _field(value, options.text_field, "--text-field", place)
    return Record(checked(text, lambda: f"{place}: field {options.text_field!r}"), place)


def _field(record: dict[str, Any], name: str, option: str, place: Place) -> object:
    """A field by its name; a.b is field b of the object in field a, unless a field has the very name a.b."""
    if name in record:
        return record[name]
    inner: object = record
    for part in name.split("."):
        if not isinstance(inner, dict) or part not in inner:
            fields = ", ".join(map(str, record)) or "none"
            raise UserError(f"{place}: has no field {name!r} (fields here: {fields}); choose another with {option}")
        inner = inner[part]
    return inner


def _loads(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of more digits than Python converts, in a field that we do not need
        return json.loads(line, parse_int=float)


@cache
def _lines_before(path: str, offset: int) -> int:
    if not offset:
        return 0
    from data_pipeline.prepare.files import File  # here: files.py needs nothing else of documents

    with File(path).open() as file:
        return sum(chunk.count(b"\n") for chunk in _chunks(file, offset))


def _chunks(file: Any, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        yield chunk
        size -= len(chunk)
