"""Columns of parquet and Arrow files, Hugging Face's among them. A piece is a range of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from data_pipeline.prepare.documents import Place, ReadOptions, Record, Skipped, checked
from data_pipeline.prepare.files import File, is_address
from data_pipeline.prepare.pieces import PIECE_BYTES, Format, Piece

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024


def _cut_parquet(file: File, options: ReadOptions) -> Iterator[Piece]:
    with _parquet(file) as table:
        columns = _columns(file, table.schema_arrow.names, options)
        paths = [table.metadata.schema.column(number).path.partition(".")[0] for number in range(table.metadata.num_columns)]
        groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
        first = 0
        for group in groups:
            stored = [group.column(number).total_uncompressed_size for number, name in enumerate(paths) if name in columns]
            yield from _ranges(file, first, group.num_rows, sum(stored))
            first += group.num_rows


def _read_parquet(piece: Piece, options: ReadOptions) -> Iterator[Record]:
    with _parquet(piece.file) as table:
        columns = _columns(piece.file, table.schema_arrow.names, options)
        first = 0
        for number in range(table.metadata.num_row_groups):
            rows = table.metadata.row_group(number).num_rows
            if first + rows > piece.start and first < piece.stop:
                batches = table.iter_batches(batch_size=BATCH_ROWS, row_groups=[number], columns=columns)
                yield from _records(piece, first, batches, options)
            first += rows


def _cut_arrow(file: File, options: ReadOptions) -> Iterator[Piece]:
    with _arrow(file) as batches:
        first = 0
        for batch in batches:
            columns = _columns(file, batch.schema.names, options)
            yield from _ranges(file, first, batch.num_rows, sum(batch.column(name).nbytes for name in columns))
            first += batch.num_rows


def _read_arrow(piece: Piece, options: ReadOptions) -> Iterator[Record]:
    with _arrow(piece.file) as batches:
        yield from _records(piece, 0, batches, options)


def _ranges(file: File, first: int, rows: int, size: int) -> Iterator[Piece]:
    """`rows` rows with `size` bytes of text as pieces of about PIECE_BYTES."""
    pieces = max(1, min(rows, round(size / PIECE_BYTES)))
    for number in range(pieces if rows else 0):
        start, stop = (first + rows * bound // pieces for bound in (number, number + 1))
        yield Piece(file, start, stop, size=size // pieces)


def _records(piece: Piece, first: int, batches: Any, options: ReadOptions) -> Iterator[Record]:
    """The documents of the rows of `piece`; the first row of the first batch is number `first` of the file."""
    for batch in batches:
        low, high = max(piece.start - first, 0), min(piece.stop - first, batch.num_rows)
        if low < high:
            texts = _values(batch, options.text_field)
            names = None if options.id_field is None else _values(batch, options.id_field)
            for row in range(low, high):
                place = Place(piece.file.path, "row", first + row + 1)
                if names is not None:
                    place = replace(place, identifier=str(_value(names, row))[:100])
                yield Record(_text(texts, row, place, options.text_field), place)
        first += batch.num_rows
        if first >= piece.stop:
            return


def _text(column: pyarrow.Array, row: int, place: Place, field: str) -> str | Skipped:
    try:
        value = _value(column, row)
    except UnicodeDecodeError:
        return Skipped.NOT_UTF8
    return checked(value, lambda: f"{place}: column {field!r}")


def _value(column: pyarrow.Array, row: int) -> object:
    return column[row].as_py()


def _values(batch: pyarrow.RecordBatch, field: str) -> pyarrow.Array:
    """A column by its name; a.b is field b of the column of structs a."""
    import pyarrow.compute

    if field in batch.schema.names:
        return batch.column(field)
    root, *inner = field.split(".")
    return pyarrow.compute.struct_field(batch.column(root), inner)


def _columns(file: File, names: list[str], options: ReadOptions) -> list[str]:
    """The columns that hold the text and the id. UserError if there is none of such a name."""
    wanted = []
    for field, option in ((options.text_field, "--text-field"), (options.id_field, "--id-field")):
        if field is None:
            continue
        column = field if field in names else field.partition(".")[0]
        if column not in names:
            raise UserError(f"{file.path}: has no column {field!r} (columns: {', '.join(names)}); choose another with {option}")
        wanted.append(column)
    return list(dict.fromkeys(wanted))


@contextmanager
def _parquet(file: File) -> Iterator[Any]:
    from pyarrow import parquet

    with _said_of(file, "parquet"), file.open() as stream, parquet.ParquetFile(stream) as table:
        yield table


@contextmanager
def _arrow(file: File) -> Iterator[Iterator[pyarrow.RecordBatch]]:
    """The record batches of an Arrow stream, as `datasets` writes it, or an Arrow file. On a disk it is mapped, not read."""
    import pyarrow
    from pyarrow import ipc

    with _said_of(file, "Arrow"):
        stream = pyarrow.PythonFile(file.open(), "r") if is_address(file.path) else pyarrow.memory_map(file.path)
        with stream:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            if is_file:
                table = ipc.open_file(stream)
                yield (table.get_batch(number) for number in range(table.num_record_batches))
            else:
                yield iter(ipc.open_stream(stream))


@contextmanager
def _said_of(file: File, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.path}: is not a valid {kind} file, or is cut off: {error}") from error


PARQUET = Format(_cut_parquet, _read_parquet)
ARROW = Format(_cut_arrow, _read_arrow)
