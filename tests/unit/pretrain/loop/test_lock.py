"""One run a folder, and what a crash leaves of its lock."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.loop.lock import LOCK, check_free, run_lock
from tests.helpers import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from pretrain.loop.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_holder_is_named_until_it_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        message = f"^run.folder = '{tmp_path}': is in use by process {holder.pid} on '{socket.gethostname()}'; wait until"
        with pytest.raises(UserError, match=message), run_lock(tmp_path, patience=0.0):
            pass
        with pytest.raises(UserError, match=message):
            check_free(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    check_free(tmp_path)
    with run_lock(tmp_path):
        assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()


def test_a_folder_that_no_run_has_used_is_free(tmp_path: Path) -> None:
    check_free(tmp_path)
    check_free(tmp_path / "absent")


def test_a_holder_that_has_not_written_its_name(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        (tmp_path / LOCK).write_text("{")
        with pytest.raises(UserError, match="is in use by another process; wait"), run_lock(tmp_path, patience=0.0):
            pass
        own = pytest.raises(UserError, match=f"^'{tmp_path}' of another process$")
        with own, run_lock(tmp_path, patience=0.0, busy="{folder} of {holder}"):
            pass


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with run_lock(tmp_path):
        pass
    assert capsys.readouterr().err == f"warning: {tmp_path}: cannot be locked (No locks available); start no other run in it\n"
