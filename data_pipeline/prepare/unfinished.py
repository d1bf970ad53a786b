"""The folder in which `prepare` keeps finished blocks until its output is complete, so that a command that was killed resumes.

It stands beside the output as `.NAME.partial`. One process holds its lock; what it is for stands in it, so that no blocks of
other inputs or options are ever taken.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, Any

from configs.durable import sync, write_text
from configs.errors import UserError
from data_pipeline.folder import rename_over
from data_pipeline.prepare.pool import WorkerLostError
from data_pipeline.read.manifest import manifest_sha256

IDENTITY, BLOCKS, _LOCK, _FINISHED, _PLACED = "identity.json", "blocks", "lock", "finished", "placed"


class Unfinished:
    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        self.output = Path(os.path.realpath(output))  # Path.resolve would raise on a loop of links; here mkdir reports it
        self.path = self.output.with_name(f".{self.output.name}.partial")
        self.blocks = self.path / BLOCKS
        self._identity = json.loads(json.dumps(identity))
        self._lock: IO[bytes] | None = None

    def open(self, discard: bool) -> None:
        """Lock the folder, and make it if it is not there. UserError if another process has it, or it is for something else.

        `discard` throws away what is for something else.
        """
        try:
            self._take_lock()
            known = self.path / IDENTITY
            if not known.is_file():
                self._empty()  # what a command left that was killed while it deleted the folder: of which options nobody knows
            elif json.loads(known.read_bytes()) != self._identity:
                if not discard:
                    self._release()
                    raise UserError(
                        f"--output {self.output}: {self.path} holds unfinished work with other inputs or options: "
                        f"{_differences(json.loads(known.read_bytes()), self._identity)}; give the same to resume it, or "
                        "--overwrite to discard it"
                    )
                self._empty()
            if known.is_file() and any(self.blocks.glob("*.npz")):
                print(f"resuming from {self.path}", file=sys.stderr)
            self.blocks.mkdir(exist_ok=True)
            write_text(known, json.dumps(self._identity, indent=1))
        except ValueError as error:
            raise UserError(f"{self.path / IDENTITY}: is damaged; delete {self.path}") from error

    def _take_lock(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("a+b")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().decode(errors="replace") or "unknown"
            self._release()
            raise UserError(f"--output {self.output}: another command is preparing it now ({holder})") from error
        except OSError:
            pass  # a file system without locks
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._lock.flush()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def new_folder(self) -> Path:
        """An empty folder for the output's files."""
        folder = self.path / _FINISHED
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def place_finished(self, replace: bool) -> None:
        """Rename the folder of the output's files to the output."""
        write_text(self.path / _PLACED, manifest_sha256(self.path / _FINISHED))
        self.place(self.path / _FINISHED, replace)

    def tidy_up(self) -> None:
        """Delete what a command has left that was killed after its output had appeared."""
        with suppress(OSError, UserError):
            if (self.path / _PLACED).read_text() == manifest_sha256(self.output):
                self._take_lock()
                self.close(keep=False)

    def place(self, folder: Path, replace: bool) -> None:
        """Rename a finished folder to the output, once it is on the disk."""
        for file in folder.iterdir():
            sync(file)
        sync(folder)
        if not replace and self.output.is_dir() and any(self.output.iterdir()):
            raise UserError(f"--output {self.output}: has been written by another command meanwhile; nothing was changed")
        rename_over(folder, self.output)
        replaced = f".{escape(self.output.name)}.partial-{'[0-9a-f]' * 8}"  # by a command that was killed in rename_over
        for old in self.output.parent.glob(replaced):
            shutil.rmtree(old, ignore_errors=True)
        sync(self.output.parent)

    def place_all(self, replace: bool) -> None:
        """Rename the folder itself to the output."""
        (self.path / _LOCK).unlink()
        self.place(self.path, replace)

    def close(self, keep: bool) -> None:
        """Delete the folder, unless `keep` is set and there is anything to resume from."""
        if self._lock is None:
            return
        if keep and any(file.suffix == ".npz" for file in self.blocks.glob("*")):
            print(f"finished parts are kept in {self.path}; the same command resumes", file=sys.stderr)
        else:
            with suppress(OSError):
                self._empty()  # first: without its lock another command would take the folder
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()


@contextmanager
def unfinished(output: Path, identity: dict[str, Any], discard: bool) -> Iterator[Unfinished]:
    """Keep finished blocks unless input or options are at fault; an OSError, such as a full disk, becomes a UserError."""
    folder = Unfinished(output, identity)
    keep = False
    try:
        folder.open(discard)
        yield folder
    except OSError as error:
        keep = True
        raise UserError(f"{folder.output}: cannot be written: {error.strerror or error}") from error
    except UserError as error:
        keep = isinstance(error, WorkerLostError)
        raise
    except BaseException:  # a signal, or a fault of the program, such as too little memory
        keep = True
        raise
    finally:
        with suppress(OSError):
            folder.close(keep)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)))
