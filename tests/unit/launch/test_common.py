"""Types of command-line arguments: what they accept, and what they say of the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.common import output_file, output_folder
from tests.helpers import ROOT


def test_an_output_file_may_be_new_or_there_already(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("[]")
    for name in ("new.json", "old.json"):
        assert output_file(".json")(str(tmp_path / name)) == tmp_path / name
    assert (tmp_path / "old.json").read_text() == "[]"
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/a.json", "no such folder; make it, or name another file"),
        ("a.txt", "must end in .json or .png"),
        ("folder.json", "cannot be written .Is a directory.; name another file"),
        (f"{'a' * 300}.json", "cannot be written .File name too long.; name another file"),
        ("file/a.json", "no such folder; make it, or name another file"),
    ],
)
def test_an_output_file_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{tmp_path / name}: {message}$"):
        output_file(".json", ".png")(str(tmp_path / name))


def test_an_output_that_may_not_be_written() -> None:
    """Where even root may not write."""
    with pytest.raises(UserError, match=r"^/proc/a\.json: cannot be written .*; name another file$"):
        output_file()("/proc/a.json")
    with pytest.raises(UserError, match=r"^/proc: cannot be written .*; name another folder$"):
        output_folder("/proc")


def test_an_output_that_is_no_file_is_not_opened_before_its_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a reader
    assert output_file()(str(tmp_path / "pipe")) == tmp_path / "pipe"


def test_an_output_folder_is_made(tmp_path: Path) -> None:
    assert output_folder(str(tmp_path / "a" / "b")).is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \(File exists\); name another folder"):
        output_folder(str(tmp_path / "file"))


def test_a_missing_package_is_one_line() -> None:
    """An interpreter without the environment: `-S` leaves site-packages out."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import launch.common"
    result = subprocess.run(
        [sys.executable, "-S", "-c", program, str(ROOT)], capture_output=True, text=True, check=False, cwd="/"
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: pydantic is not installed for ")
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_package_is_named_as_pip_knows_it() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import launch; sys.modules['megatron'] = None; import megatron.core"
    result = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, check=False, cwd="/")
    assert result.stderr.startswith("error: megatron-core is not installed for ")


def test_a_missing_module_of_ours_is_a_fault_of_the_code_and_shows_where() -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import launch; import model.no_such_module"
    result = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_characters_that_the_terminal_lacks_are_written_in_ascii() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from launch.common import run_command\n"
        "run_command(lambda: print('naïve →'))"
    )
    variables = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, check=True, env=variables)
    assert result.stdout == b"na\\xefve \\u2192\n"
