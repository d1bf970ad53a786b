"""One run a folder: the first rank of a run holds a lock on it, which the operating system releases when the process ends.

So does a sweep in the folder of its study.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from configs.errors import UserError

LOCK = ".lock"  # in a run's folder; stays there
PATIENCE = 5.0  # seconds: a killed process keeps its lock until the system has freed its memory


RUN = "run.folder = {folder}: is in use by {holder}; wait until that run ends, or pass another --run.folder"


@contextmanager
def run_lock(folder: Path, patience: float = PATIENCE, busy: str = RUN) -> Iterator[None]:
    """Hold the lock of a run's folder. UserError that names the holder if another process keeps it for `patience` seconds.

    `busy` is that error's text. Raises OSError.

    The lock is `flock`'s, which Linux passes on to NFS servers: it works between hosts where the server supports locks.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            _lock(file, time.monotonic() + patience)
        except BlockingIOError:
            raise _in_use(folder, file, busy) from None
        except OSError as error:
            print(
                f"warning: {folder}: cannot be locked ({error.strerror}); start no other run in it", file=sys.stderr, flush=True
            )
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
        file.flush()
        yield


def check_free(folder: Path) -> None:
    """UserError if a run holds the lock of its folder now."""
    with suppress(FileNotFoundError, NotADirectoryError), (folder / LOCK).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder, file) from None


def _in_use(folder: Path, file: TextIO, busy: str = RUN) -> UserError:
    file.seek(0)
    return UserError(busy.format(folder=repr(str(folder)), holder=_holder(file.read())))


def _lock(file: TextIO, until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {int(holder['process'])} on {str(holder['host'])!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not yet written who it is
