"""Where checkpoints lie: on a file system, as Path, or in any storage that fsspec knows, as `RemotePath`. Torch-free.

What reads a checkpoint takes either: a `RemotePath` has those of Path's methods that readers need.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from configs.errors import UserError, shortened

_URL = re.compile(r"([\w.+-]+::)*([A-Za-z][\w.+-]*)://")
_LOCAL = ("file://", "local://")
_LONGEST_REASON = 300  # characters of what a storage says of an error
_PIECE = 2**24  # bytes of one request


def is_url(text: str) -> bool:
    """Whether fsspec is asked for what this names."""
    return _URL.match(text) is not None and not text.startswith(_LOCAL)


def place(text: str) -> Place:
    """What a user names. UserError for a storage that is unknown, or whose package is not installed."""
    if not is_url(text):
        return Path(re.sub(f"^({'|'.join(_LOCAL)})", "", text))
    from fsspec.core import url_to_fs

    try:
        return RemotePath(*url_to_fs(text))
    except ImportError as error:
        raise UserError(
            f"{text}: needs a package that is not installed ({error}); `make install` has that of s3, pip those of others"
        ) from error
    except Exception as error:  # each storage has errors of its own
        raise UserError(f"{text}: no storage ({_reason(error)})") from error


def local_path(text: str) -> Path:
    """What a user names, for what only knows file systems: UserError for anything else."""
    if is_url(text):
        raise UserError(
            f"{text}: is not on a file system; `python launch/checkpoint.py copy` copies checkpoints from and to it"
        )
    found = place(text)
    assert isinstance(found, Path)
    return found


class RemotePath:
    """A file or folder in a storage. Its methods raise UserError for whatever keeps the storage from answering."""

    def __init__(self, storage: Any, path: str) -> None:
        """`storage` is a file system of fsspec, `path` a name in it."""
        self._storage, self._path = storage, path.rstrip("/")

    def __str__(self) -> str:
        return str(self._storage.unstrip_protocol(self._path))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._storage, f"{self._path}/{name}")

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    def exists(self) -> bool:
        return self._kind() is not None

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def is_file(self) -> bool:
        return self._kind() == "file"

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Of this folder, not of those below it."""
        with self._speaking():
            names = [str(name).rstrip("/").rpartition("/")[2] for name in self._storage.ls(self._path, detail=False)]
        return (self / name for name in sorted(names) if fnmatch(name, pattern))

    def read_bytes(self) -> bytes:
        with self._speaking():
            return bytes(self._storage.cat_file(self._path))

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    def read(self, start: int, stop: int) -> bytes:
        with self._speaking():
            return bytes(self._storage.cat_file(self._path, start=start, end=stop))

    def write(self, pieces: Iterable[bytes], size: int) -> None:
        """Replace the file; an interrupted one may be there in part. `size` in bytes."""
        with self._speaking():  # object stores limit the number of blocks
            with self._storage.open(self._path, "wb", block_size=max(4 * _PIECE, size // 5000)) as file:
                for piece in pieces:
                    file.write(piece)
            self._storage.invalidate_cache()

    def delete(self) -> None:
        """Delete a file."""
        with self._speaking():
            self._storage.rm_file(self._path)
            self._storage.invalidate_cache()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of this folder and those below it, by their names in it."""
        with self._speaking():
            found = self._storage.find(self._path, detail=True)
        return {name.removeprefix(self._path).lstrip("/"): int(info["size"]) for name, info in found.items()}

    def modified(self) -> datetime | None:
        """When it was written; None if the storage does not know."""
        with self._speaking():
            try:
                found = self._storage.modified(self._path)
            except (NotImplementedError, KeyError):
                return None
        return found if isinstance(found, datetime) else None

    def _kind(self) -> str | None:
        found = self.info()
        return None if found is None else str(found["type"])

    def info(self) -> dict[str, Any] | None:
        """What the storage knows of it, its `type` and `size` among that; None if it is not there."""
        with self._speaking():
            try:
                found: dict[str, Any] = self._storage.info(self._path)
            except FileNotFoundError as error:
                if self._path.strip("/") in str(error):
                    return None
                raise  # the storage's own words, such as of a missing bucket
        return found

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each storage has errors of its own
            raise UserError(f"{self}: {_reason(error)}") from error


Place = Path | RemotePath


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and "bucket" not in str(error):
        return "does not exist"
    text = " ".join(str(error).split())
    # A text of one word, such as the key of a KeyError, says nothing by itself.
    return shortened(text if " " in text else f"{type(error).__name__} {text}".strip(), _LONGEST_REASON)


def size_of(file: Place) -> int | None:
    """Bytes of a file; None if there is none."""
    if isinstance(file, RemotePath):
        found = file.info()
        return int(found["size"]) if found is not None and found["type"] == "file" else None
    return file.stat().st_size if file.is_file() else None


def sizes(folder: Place) -> dict[str, int]:
    """Bytes of every file of a folder and those below it, by their names in it."""
    if isinstance(folder, RemotePath):
        return folder.sizes()
    found = {}
    for below, _, names in os.walk(folder):
        for path in (Path(below, name) for name in names):
            with suppress(FileNotFoundError):  # of a checkpoint that is being written
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def modified(file: Place) -> datetime | None:
    """When a file was written, if that is known."""
    if isinstance(file, RemotePath):
        return file.modified()
    return datetime.fromtimestamp(file.stat().st_mtime, UTC)


def read_range(file: Place, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file, fewer if it ends before. UserError where it cannot be read."""
    if isinstance(file, RemotePath):
        return file.read(start, stop)
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            return opened.read(stop - start)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def pieces(file: Place, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, in pieces of bounded size; it ends early with the file."""
    for start in range(0, size, _PIECE):
        piece = read_range(file, start, min(start + _PIECE, size))
        yield piece
        if len(piece) < min(_PIECE, size - start):
            return
