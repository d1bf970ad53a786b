"""Files to read documents from: on a disk or in a store that fsspec knows, plain or compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from configs.errors import UserError


@dataclass(frozen=True)
class File:
    path: str  # a path, or an address such as s3://bucket/name
    size: int | None = None  # bytes; None: not known, so it can only be read from its beginning to its end

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def kind(self) -> str:
        """What the name says of the content, in lower case, such as ".jsonl"."""
        name = self.name[: -len(self.compression)] if self.compression else self.name
        return Path(name).suffix.lower()

    @property
    def compression(self) -> str:
        """ ".gz", ".bz2", ".xz", ".zst", or "" if the file is plain."""
        suffix = Path(self.name).suffix.lower()
        return suffix if suffix in DECOMPRESSORS else ""

    @property
    def seekable(self) -> bool:
        """True if parts of its content can be read by themselves."""
        return self.size is not None and not self.compression

    def open(self) -> IO[bytes]:
        """Its bytes as stored. OSError, or what its store raises."""
        if not is_address(self.path):
            return Path(self.path).open("rb")
        store, inner = store_of(self.path)
        return store.open(inner, "rb")

    def open_content(self) -> IO[bytes]:
        """Its bytes, decompressed. EOFError if there are none, though a compressed file always has some."""
        if self.compression and self.size == 0:
            raise EOFError("it has no bytes")
        stream = self.open()
        return DECOMPRESSORS[self.compression](stream) if self.compression else stream


def is_address(path: str) -> bool:
    return "://" in path


def store_of(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the address inside it."""
    from fsspec.core import url_to_fs

    return url_to_fs(address)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what opening, reading and decompressing `path` may raise into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries that decompress raise OSError without a number; those of the system have one.
        of_content = isinstance(error, OSError) and error.errno is None and not is_address(path)
        if of_content or isinstance(error, EOFError | zlib.error | lzma.LZMAError) or "runcated" in str(error):
            raise UserError(f"{path}: is cut off or damaged ({error}); copy it again") from error
        if isinstance(error, OSError) or is_address(path):  # stores raise errors of their own
            raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        raise


def _zstandard(stream: IO[bytes]) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd"), 1 << 20)


DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstandard}
