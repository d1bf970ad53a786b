"""A copy of a checkpoint, on a file system or in any storage of fsspec: complete or none. Torch-free.

On a file system it grows in a hidden folder beside its place, and is renamed. A storage renames nothing: there the marker is
written last, so that an interrupted copy is no checkpoint; the same command continues it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configs.durable import sync, write_text
from configs.errors import UserError
from data_pipeline.folder import atomic_folder
from data_pipeline.prepare.progress import ByteProgress
from data_pipeline.read.manifest import FileRecord
from pretrain.checkpoints.folder import MARKER, DamagedError, Marker, marker_bytes, parse_marker, read_marker
from pretrain.checkpoints.storage import Place, RemotePath, pieces, size_of, sizes
from pretrain.checkpoints.tools.verify import THREADS, record_of

_SPARE = 2**20  # bytes of a file system that other files may need meanwhile


def copy(source: Place, target: Place, overwrite: bool) -> Marker:
    """Copy a checkpoint; its marker. Each file is compared with its hash as it is read, and again where it was written.

    UserError if `target` holds anything and `overwrite` is not set, or anything but a checkpoint if it is; and where a file
    is damaged.
    """
    content = marker_bytes(source)
    marker = parse_marker(source, content)
    if str(source) == str(target) or (isinstance(source, Path) and isinstance(target, Path) and _same(source, target)):
        raise UserError(f"{target}: is the checkpoint itself; name another folder")
    total = 2 * sum(record.bytes for record in marker.files.values())
    with ByteProgress(f"copy {source.name}", total) as progress:
        if isinstance(target, RemotePath):
            _copy_to_storage(source, target, marker, content, overwrite, progress.advance)
        else:
            _copy_to_folder(source, target, marker, content, overwrite, progress.advance)
    return marker


def _same(source: Path, target: Path) -> bool:
    return source.resolve() == target.resolve()


def _copy_to_folder(
    source: Place, target: Path, marker: Marker, content: bytes, overwrite: bool, advance: Callable[[int], object]
) -> None:
    if not (overwrite and (target / MARKER).is_file()):
        _check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(record.bytes for record in marker.files.values()) + _SPARE, shutil.disk_usage(target.parent).free
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    if needed > free:
        raise UserError(f"{target}: needs {needed / 1e6:,.0f} MB, its file system has {free / 1e6:,.0f} MB left")
    with atomic_folder(target, replace=overwrite) as building:
        folders = {(building / name).parent for name in marker.files} - {building}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)

        def write(name: str) -> None:
            with (building / name).open("wb") as file:
                for piece in _checked(source / name, marker.files[name], advance):
                    file.write(piece)
            sync(building / name)
            _check(building / name, marker.files[name], advance)

        _each(list(marker.files), write)
        for folder in folders:
            sync(folder)
        write_text(building / MARKER, content.decode())


def _check_free(target: Path) -> None:
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        hint = "--overwrite replaces it" if (target / MARKER).is_file() else "name a new folder, which becomes the checkpoint"
        raise UserError(f"{target}: already exists; {hint}")


def _copy_to_storage(
    source: Place, target: RemotePath, marker: Marker, content: bytes, overwrite: bool, advance: Callable[[int], object]
) -> None:
    found = sizes(target) if target.is_dir() else {}
    others = sorted(found.keys() - marker.files.keys() - {MARKER})
    if MARKER in found:
        if not overwrite:
            raise UserError(f"{target}: already holds a checkpoint; --overwrite replaces it")
        others = sorted(set(others) & read_marker(target).files.keys())
        (target / MARKER).delete()  # what is replaced in part is no checkpoint
    elif others or target.is_file():
        raise UserError(f"{target}: already exists ({others[0] if others else 'a file'}); name a new folder")
    for name in others:
        (target / name).delete()

    def write(name: str) -> None:
        record, file = marker.files[name], target / name
        if found.get(name) == record.bytes and record_of(file, record.bytes, advance) == record:
            advance(record.bytes)
            return  # of a copy that was interrupted
        file.write(_checked(source / name, record, advance), record.bytes)
        if size_of(file) != record.bytes:
            raise DamagedError(f"{file}: arrived with {size_of(file)} bytes instead of {record.bytes}")
        _check(file, record, advance)

    _each(list(marker.files), write)
    (target / MARKER).write([content], len(content))


def _each(names: list[str], write: Callable[[str], None]) -> None:
    """Write the files, several at once. The first error ends it all."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        for _ in pool.map(write, names):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _checked(file: Place, record: FileRecord, advance: Callable[[int], object]) -> Iterator[bytes]:
    """A file's pieces; DamagedError after the last if they are not what was written."""
    digest, count = hashlib.sha256(), 0
    for piece in pieces(file, record.bytes):
        digest.update(piece)
        count += len(piece)
        advance(len(piece))
        yield piece
    if FileRecord(count, digest.hexdigest()) != record or size_of(file) != record.bytes:
        raise DamagedError(f"{file}: its content is not what was written (corrupt)")


def _check(file: Place, record: FileRecord, advance: Callable[[int], object]) -> None:
    if record_of(file, record.bytes, advance) != record:
        raise DamagedError(f"{file}: was not written as it was read; copy it again")
