"""Data sets of the Hugging Face hub, streamed or downloaded, named as `hub:OWNER/NAME?name=CONFIG&split=SPLIT`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl

from configs.errors import UserError
from data_pipeline.prepare.documents import Place, ReadOptions, Record, object_record
from data_pipeline.prepare.files import File
from data_pipeline.prepare.pieces import Format, Piece, pieces_of_records

PREFIX = "hub:"
PARAMETERS = ("name", "split", "revision", "streaming")


def parse(given: str) -> tuple[str, dict[str, str]]:
    """The name of a data set, and what follows it. UserError if that is not of the form of `PREFIX`."""
    name, _, query = given.removeprefix(PREFIX).partition("?")
    try:
        parameters = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise UserError(f"--input {given}: write {PREFIX}OWNER/NAME?name=CONFIG&split=SPLIT") from error
    unknown = [key for key in parameters if key not in PARAMETERS]
    if unknown or not name:
        raise UserError(f"--input {given}: write {PREFIX}OWNER/NAME, and after a ? only {', '.join(PARAMETERS)}")
    if parameters.get("streaming", "yes") not in ("yes", "no"):
        raise UserError(f"--input {given}: streaming is yes (nothing is kept) or no (downloaded first)")
    return name, parameters


def _cut(file: File, options: ReadOptions) -> Iterator[Piece]:
    rows = enumerate(_rows(file.path, options), start=1)
    yield from pieces_of_records(file, (object_record(row, options, Place(file.path, "row", number)) for number, row in rows))


def _rows(given: str, options: ReadOptions) -> Iterator[dict[str, Any]]:
    with reading_hub(given):
        yield from opened(given, options)


@contextmanager
def reading_hub(given: str) -> Iterator[None]:
    """Turn what `datasets` raises, whatever the network, the hub and its readers do, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--input {given}: cannot be read: {' '.join(str(error).split())[:500]}") from error


def opened(given: str, options: ReadOptions) -> Any:
    """The rows of a data set, with the columns that hold text and id. Raises what `datasets` does."""
    import datasets

    name, parameters = parse(given)
    rows = datasets.load_dataset(
        name,
        parameters.get("name"),
        split=parameters.get("split", "train"),
        revision=parameters.get("revision"),
        streaming=parameters.get("streaming", "yes") == "yes",
    )
    fields = [field for field in (options.text_field, options.id_field) if field is not None]
    columns = list(dict.fromkeys(field if field in rows.column_names else field.partition(".")[0] for field in fields))
    known = set(rows.column_names or columns)
    return rows.select_columns([column for column in columns if column in known])


def _read(piece: Piece, options: ReadOptions) -> Iterator[Record]:
    assert piece.records is not None
    return iter(piece.records)


HUB = Format(_cut, _read)
