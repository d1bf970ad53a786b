"""Read documents from the standard library, text, JSON lines, parquet and Hugging Face folders, in a fixed order.

Everything except a `.txt` that is one document is streamed, so memory does not grow with the size of a file.
"""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, get_args

from configs.errors import UserError

DocumentUnit = Literal["file", "paragraph", "line"]
DOCUMENT_UNITS: tuple[DocumentUnit, ...] = get_args(DocumentUnit)
STDLIB = "stdlib"
_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Skipped(Enum):
    """Why a document is skipped; the manifest counts them."""

    NOT_UTF8 = "not UTF-8"
    EMPTY = "empty"


@dataclass(frozen=True)
class ReadOptions:
    document: DocumentUnit = "file"  # what counts as one document in a .txt
    text_field: str = "text"  # the field or column with the text in .jsonl, .parquet and Hugging Face folders


@dataclass(frozen=True)
class Source:
    """One input as given: "stdlib" or a path, and the files it stands for."""

    path: str
    kind: str
    files: tuple[Path, ...]

    def documents(self, options: ReadOptions) -> Iterator[str | Skipped]:
        """Texts in order, with a Skipped in place of each unusable one. UserError if a file cannot be read."""
        for file in self.files:
            read = BY_KIND.get(self.kind) or BY_EXTENSION[_extension(file)]
            try:
                yield from read(file, options)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """One Source for each input. UserError if a path is missing or of unknown kind, or if a folder has no known file."""
    sources = []
    for given in inputs:
        try:
            sources.append(_find_source(given))
        except OSError as error:  # a name too long, a folder without permission
            place = f" in {error.filename}" if error.filename not in (None, given) else ""
            raise UserError(f"--input {given}: cannot be read: {error.strerror}{place}") from error
    return sources


def _find_source(given: str) -> Source:
    path = Path(given)
    if given == STDLIB:
        return Source(given, STDLIB, tuple(_standard_library()))
    if not path.exists():
        raise UserError(f"--input {given}: no such file or folder")
    if path.is_file():
        if _extension(path) not in BY_EXTENSION:
            raise UserError(f"--input {given}: unknown kind of file; known are {_known()}")
        return Source(given, _extension(path).split(".")[1], (path,))
    if not path.is_dir():
        raise UserError(f"--input {given}: is neither a file nor a folder")
    return _folder_source(given, path)


def _folder_source(given: str, path: Path) -> Source:
    if (path / "dataset_dict.json").is_file():
        parts = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise UserError(f"--input {given}: a Hugging Face DatasetDict; name one or more of its folders: {', '.join(parts)}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return Source(given, "huggingface", (path,))
    files = [file for file in _walk(path) if _extension(file) in BY_EXTENSION]
    if not files:
        raise UserError(f"--input {given}: the folder holds no file of a known kind; known are {_known()}")
    for file in files:
        if not file.is_file():  # opening a pipe could wait for ever
            raise UserError(f"--input {given}: {file} is no regular file, or a link to nothing")
    return Source(given, "folder", tuple(files))


def _standard_library() -> list[Path]:
    return [file for file in _walk(Path(sysconfig.get_path("stdlib")), _TEST_FOLDERS) if file.suffix == ".py"]


def _walk(folder: Path, left_out: Collection[str] = ()) -> list[Path]:
    """All files below `folder`, sorted, without hidden ones and without folders named in `left_out`."""

    def fail(error: OSError) -> None:
        raise error  # os.walk by itself would skip the folder

    files: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def _extension(path: Path) -> str:
    return ".jsonl.gz" if path.name.endswith(".jsonl.gz") else path.suffix


def _known() -> str:
    return ", ".join(BY_EXTENSION) + ", a folder of these, or stdlib"


def _decode(data: bytes) -> str | Skipped:
    try:
        text = data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError:
        return Skipped.NOT_UTF8
    return text if text.strip() else Skipped.EMPTY


def _read_file(file: Path, options: ReadOptions) -> Iterator[str | Skipped]:
    yield _decode(file.read_bytes())


def _read_text(file: Path, options: ReadOptions) -> Iterator[str | Skipped]:
    if options.document == "file":
        yield _decode(file.read_bytes())
        return
    with file.open("rb") as lines:
        for part in lines if options.document == "line" else _paragraphs(lines):
            yield _decode(part.rstrip(b"\r\n"))


def _paragraphs(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Runs of lines between blank ones."""
    paragraph: list[bytes] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield b"".join(paragraph)
            paragraph = []
    if paragraph:
        yield b"".join(paragraph)


def _read_jsonl(file: Path, options: ReadOptions) -> Iterator[str | Skipped]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decode(line)
            if text is Skipped.EMPTY:
                continue  # a blank line is no document
            yield text if isinstance(text, Skipped) else _json_text(text, options.text_field, f"{file}:{number}")


def _json_text(line: str, field: str, place: str) -> str | Skipped:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise UserError(f"{place}: not valid JSON ({reason}); each line is one object") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: holds {type(record).__name__}, not an object with the text in a field")
    if field not in record:
        fields = ", ".join(record) or "none"
        raise UserError(f"{place}: has no field {field!r} (fields here: {fields}); choose another with --text-field")
    return _checked(record[field], f"{place}: field {field!r}")


def _checked(value: object, place: str) -> str | Skipped:
    """A text value that can be written as UTF-8 (JSON may hold half a surrogate pair); null counts as empty."""
    if value is None:
        return Skipped.EMPTY
    if not isinstance(value, str):
        raise UserError(f"{place} holds {type(value).__name__}, not text; choose another with --text-field")
    if not value.strip():
        return Skipped.EMPTY
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return Skipped.NOT_UTF8
    return value


def _read_parquet(file: Path, options: ReadOptions) -> Iterator[str | Skipped]:
    import pyarrow as arrow
    from pyarrow import parquet

    field = options.text_field
    try:
        with parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise UserError(f"{file}: has no column {field!r} (columns: {names}); choose another with --text-field")
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0):
                    yield _arrow_text(value, f"{file}: column {field!r}")
    except arrow.ArrowException as error:
        raise UserError(f"{file}: is not a valid parquet file: {error}") from error


def _arrow_text(value: object, place: str) -> str | Skipped:
    try:
        text = value.as_py()  # type: ignore[attr-defined]
    except UnicodeDecodeError:
        return Skipped.NOT_UTF8
    return _checked(text, place)


def _read_huggingface(folder: Path, options: ReadOptions) -> Iterator[str | Skipped]:
    import datasets

    field = options.text_field
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises whatever its readers of JSON and Arrow raise
        raise UserError(f"{folder}: is not a valid Hugging Face data set: {error}") from error
    if field not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise UserError(f"{folder}: has no column {field!r} (columns: {names}); choose another with --text-field")
    for batch in rows.select_columns([field]).with_format("arrow").iter(batch_size=1024):
        for value in batch.column(0):
            yield _arrow_text(value, f"{folder}: column {field!r}")


Reader = Callable[[Path, ReadOptions], Iterator[str | Skipped]]
BY_KIND: dict[str, Reader] = {STDLIB: _read_file, "huggingface": _read_huggingface}
BY_EXTENSION: dict[str, Reader] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}
