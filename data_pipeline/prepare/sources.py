"""The inputs of a command as files, in a fixed order, and the formats by which these are read."""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from data_pipeline.prepare import hub
from data_pipeline.prepare.columns import ARROW, PARQUET
from data_pipeline.prepare.documents import ReadOptions, Record, Skipped, filtered
from data_pipeline.prepare.files import DECOMPRESSORS, File, is_address, reading, store_of
from data_pipeline.prepare.json_array import JSON
from data_pipeline.prepare.lines import JSON_LINES, TEXT
from data_pipeline.prepare.lines import STDLIB as SOURCE_CODE
from data_pipeline.prepare.pieces import Format, Piece

STDLIB = "stdlib"
HUGGINGFACE = "huggingface"
FORMATS: dict[str, Format] = {
    ".txt": TEXT,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON,
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
BY_ROWS = (".parquet", ".arrow")  # they are compressed inside, if at all
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-]+")
_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DICTIONARY = "dataset_dict.json"  # beside the folders of several data sets
_HUGGINGFACE_FILES = {"state.json", "dataset_info.json"}  # beside the .arrow files that save_to_disk writes


@dataclass(frozen=True)
class Source:
    """One input as given: "stdlib", a path, an address, a pattern or a name of the hub, and the files it stands for."""

    path: str
    kind: str
    files: tuple[File, ...]
    left_out: tuple[str, ...] = ()  # files of a folder that are of no known kind

    def pieces(self, options: ReadOptions) -> Iterator[Piece]:
        """The files, cut for processes to read. UserError if a file cannot be read."""
        for file in self.files:
            with reading(file.path):
                yield from self.format_of(file).cut(file, options)

    def read(self, piece: Piece, options: ReadOptions) -> Iterator[Record]:
        """The documents of one of `pieces`. UserError if they cannot be read, or are not of the form that was expected."""
        with reading(piece.file.path):
            for record in self.format_of(piece.file).read(piece, options):
                yield filtered(record, options)

    def documents(self, options: ReadOptions) -> Iterator[str | Skipped]:
        """Texts in order, with a Skipped in place of each unusable one. UserError if a file cannot be read."""
        for piece in self.pieces(options):
            for record in self.read(piece, options):
                yield record.text

    def format_of(self, file: File) -> Format:
        special = {STDLIB: SOURCE_CODE, "hub": hub.HUB}
        return special.get(self.kind) or FORMATS[file.kind]


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """One Source for each input. UserError if a path is missing or of unknown kind, or if a folder has no known file."""
    sources = []
    for given in inputs:
        try:
            sources.append(_find_source(given))
        except OSError as error:  # a name too long, a folder without permission
            place = f" in {error.filename}" if error.filename not in (None, given) else ""
            raise UserError(f"--input {given}: cannot be read: {error.strerror or error}{place}") from error
    return sources


def _find_source(given: str) -> Source:
    if given == STDLIB:
        return Source(given, STDLIB, tuple(map(_file, _standard_library())))
    if given.startswith(hub.PREFIX):
        hub.parse(given)
        return Source(given, "hub", (File(given),))
    if is_address(given):
        return _find_in_store(given)
    path = Path(given)
    if not path.exists():
        return _find_pattern(given)
    if path.is_file():
        file = _file(path)
        if not _is_known(file):
            raise UserError(f"--input {given}: unknown kind of file; known are {_known()}")
        return Source(given, file.kind[1:], (file,))
    if not path.is_dir():
        raise UserError(f"--input {given}: is neither a file nor a folder")
    return _folder_source(given, path)


def _find_pattern(given: str) -> Source:
    if not glob.has_magic(given):
        hint = f"; a data set of the hub is written {hub.PREFIX}{given}" if _HUB_NAME.fullmatch(given) else ""
        raise UserError(f"--input {given}: no such file or folder{hint}")
    found = sorted(path for path in map(Path, glob.glob(given, recursive=True)) if not path.is_dir())
    if not found:
        raise UserError(f"--input {given}: no file has such a name")
    return _of_known_files(given, "glob", list(map(_file, found)), "no file of such a name is of a known kind")


def _folder_source(given: str, path: Path) -> Source:
    if (path / _DICTIONARY).is_file():
        parts = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise UserError(f"--input {given}: a Hugging Face DatasetDict; name one or more of its folders: {', '.join(parts)}")
    kind = HUGGINGFACE if all((path / name).is_file() for name in _HUGGINGFACE_FILES) else "folder"
    return _of_known_files(given, kind, list(map(_file, _walk(path))), "the folder holds no file of a known kind")


def _of_known_files(given: str, kind: str, found: list[File], nothing: str) -> Source:
    folders = {file.path[: -len(file.name)] for file in found if file.name == "state.json"}
    described = {folder + name for folder in folders for name in _HUGGINGFACE_FILES}
    found = [file for file in found if file.path not in described and file.name != _DICTIONARY]
    files = [file for file in found if _is_known(file)]
    if not files:
        raise UserError(f"--input {given}: {nothing}; known are {_known()}")
    for file in files:
        if not is_address(file.path) and not Path(file.path).is_file():  # opening a pipe could wait for ever
            raise UserError(f"--input {given}: {file.path} is no regular file, or a link to nothing")
    return Source(given, kind, tuple(files), tuple(file.path for file in found if not _is_known(file)))


def _find_in_store(given: str) -> Source:
    """A file, a folder or a pattern in a store that fsspec knows."""
    try:
        store, inner = store_of(given)
        protocol = given.partition("://")[0]
        if glob.has_magic(inner):
            infos, kind = list(store.glob(inner, detail=True).values()), "glob"
        elif store.isfile(inner):
            infos, kind = [store.info(inner)], "file"
        else:
            infos, kind = list(store.find(inner, detail=True).values()), "folder"
    except Exception as error:  # each store raises errors of its own
        raise UserError(f"--input {given}: cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error
    infos = [info for info in infos if info.get("type", "file") == "file" and not _is_hidden(info["name"], inner)]
    files = [File(_address(protocol, info["name"]), info.get("size")) for info in sorted(infos, key=lambda info: info["name"])]
    if not files:
        raise UserError(f"--input {given}: no such file or folder")
    return _of_known_files(given, files[0].kind[1:] if kind == "file" else kind, files, "no file there is of a known kind")


def _is_hidden(name: str, folder: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix(folder).split("/"))


def _address(protocol: str, name: str) -> str:
    return name if is_address(name) else f"{protocol}://{name}"


def _file(path: Path) -> File:
    try:
        return File(str(path), path.stat().st_size)
    except FileNotFoundError:  # a link to nothing, which is an error only if its name is of a known kind
        return File(str(path))


def _standard_library() -> list[Path]:
    return [file for file in _walk(Path(sysconfig.get_path("stdlib")), _TEST_FOLDERS) if file.suffix == ".py"]


def _walk(folder: Path, left_out: Collection[str] = ()) -> list[Path]:
    """All files below `folder`, sorted, without hidden ones and without folders named in `left_out`.

    Links to folders are followed, but for one that leads back to a folder around it, whose files are found anyway.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk by itself would skip the folder

    files: list[Path] = []
    around: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        inside = around.pop(place)
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        real = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in inside]
        around |= {os.path.join(place, name): (*inside, real[name]) for name in folders}
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def _is_known(file: File) -> bool:
    return file.kind in FORMATS and not (file.compression and file.kind in BY_ROWS)


def _known() -> str:
    compressed = ", ".join(DECOMPRESSORS)
    return f"{', '.join(FORMATS)} (text and JSON also as {compressed}), a folder of these, {STDLIB}, or {hub.PREFIX}OWNER/NAME"
