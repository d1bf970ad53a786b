"""Folders that appear and disappear atomically: they are filled and emptied under a temporary name beside the final one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from configs.durable import sync
from configs.errors import UserError

LOCK = "in_use.lock"
MANIFEST = "manifest.json"  # a folder that has it holds prepared data
SHARD = "shard.json"  # a folder that has it holds one machine's share of them


@contextmanager
def atomic_folder(final: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into; on a clean exit its files are on the disk and it is renamed to `final`.

    After an error or an interruption nothing appears at `final`. A non-empty folder that is already there is replaced if
    `replace` is set, else kept. An OSError (disk full, no permission) becomes a UserError.
    """
    final = Path(os.path.realpath(final))  # Path.resolve would raise on a loop of links; here mkdir reports it
    try:
        with building_folder(final, rename_over if replace else _rename_unless_there) as building:
            yield building
    except OSError as error:
        raise UserError(f"{final}: cannot be written: {error.strerror or error}") from error


@contextmanager
def building_folder(final: Path, place: Callable[[Path, Path], object] = Path.rename) -> Iterator[Path]:
    """`atomic_folder` that raises OSError; `final` is a full path. `place` renames the finished folder to it.

    The default `place` fails if a non-empty folder is already there.
    """
    building = _beside(final)
    try:
        building.mkdir(parents=True)
        yield building
        for file in building.iterdir():
            sync(file)
        sync(building)
        place(building, final)
        sync(final.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def held_folder(final: Path) -> Iterator[Path]:
    """`atomic_folder` with a file LOCK, which is held until the folder has its name: `clear_abandoned` leaves it alone."""
    with ExitStack() as held:
        alone = held.enter_context(ExitStack())
        alone.enter_context(_alone(final.parent))  # while the folder has no lock yet
        with atomic_folder(final) as building:
            (building / LOCK).touch()
            held.enter_context(hold(building))
            alone.close()
            yield building


def clear_abandoned(parent: Path) -> None:
    """Delete what killed processes left in `parent` of a `held_folder`, or of one that they were deleting."""
    with _alone(parent) as alone:
        for folder in parent.glob(".*.partial-*") if alone else ():
            try:
                with (folder / LOCK).open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                pass  # half deleted
            except OSError:
                continue  # being built
            shutil.rmtree(folder, ignore_errors=True)


def hold(folder: Path) -> BinaryIO:
    """Protect `folder`, which has a file LOCK, from `delete_unless_held` in any process until the returned file is closed.

    FileNotFoundError if it was deleted meanwhile. The kernel releases the lock of a killed process, and NFS shares locks
    between machines. On a file system without locks nothing is held, but nothing is deleted either.
    """
    lock = (folder / LOCK).open("rb")
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_SH)
    _check_still_there(lock, folder)
    return lock


def delete_unless_held(folder: Path) -> None:
    """Delete `folder` unless a process holds it. No error if it is gone or may not be deleted."""
    gone = _beside(folder)
    with suppress(OSError), (folder / LOCK).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_still_there(lock, folder)
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """UserError unless `path` can become a new folder, or replace an empty one."""
    try:
        if path.is_symlink():
            raise UserError(f"{path}: is a link; name the folder itself")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; name a new folder")
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{path}: already exists and is not empty; choose another folder or delete it")
        if path.resolve() == Path.cwd() or path.is_mount():
            raise UserError(f"{path}: is the current folder or a mount point, which cannot be replaced; name a folder in it")
        if not path.resolve().parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.resolve().parent}")
    except OSError as error:  # such as a name that is too long, or a folder that may not be looked into
        raise UserError(f"{path}: {error.strerror}") from error


def check_output(output: Path, overwrite: bool) -> None:
    """UserError unless `output` is unused, or holds prepared data that may be replaced."""
    try:
        _check_output(output, overwrite)
    except UnicodeEncodeError as error:
        raise UserError(f"--output {output}: the name is not UTF-8, so no configuration could name it") from error
    except OSError as error:
        raise UserError(f"--output {output}: cannot be used: {error.strerror}") from error


def _check_output(output: Path, overwrite: bool) -> None:
    str(output).encode()
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    if (output / MANIFEST).is_file() or (output / SHARD).is_file():
        if not overwrite:
            raise UserError(f"--output {output}: already holds prepared data; --overwrite replaces it")
    elif any(output.iterdir()):
        raise UserError(f"--output {output}: is not empty and holds no prepared data; name another folder")


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """One process at a time is in such a block. False where the folder cannot be made, or its file system has no locks."""
    with ExitStack() as undo:
        locked = False
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            undo.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        yield locked


def _beside(folder: Path) -> Path:
    """A new hidden name in the same parent folder, so that a rename between the two is atomic."""
    return folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")


def rename_over(building: Path, final: Path) -> None:
    """Rename a finished folder to `final`, and delete what is there."""
    if final.exists():
        final.rename(old := _beside(final))
        building.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        _rename_unless_there(building, final)


def _rename_unless_there(building: Path, final: Path) -> None:
    try:
        building.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _check_still_there(lock: BinaryIO, folder: Path) -> None:
    """FileNotFoundError if `folder` was deleted, or created anew, between opening and locking `lock`."""
    if not os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat()):
        raise FileNotFoundError(errno.ENOENT, "deleted meanwhile", str(folder))
