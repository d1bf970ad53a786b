"""Folders appear complete or not at all, and are not deleted while they are read."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest

from configs.errors import UserError
from data_pipeline.folder import LOCK, atomic_folder, clear_abandoned, delete_unless_held, held_folder, hold


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    def fail(building: Path) -> None:
        (building / "a").write_text("half")
        raise ZeroDivisionError

    final = tmp_path / "final"
    with pytest.raises(ZeroDivisionError), atomic_folder(final) as building:
        fail(building)
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(final) as building:
        (building / "a").write_text("old")
        assert not final.exists()
    assert (final / "a").read_text() == "old"


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_is_there_is_replaced_only_when_told(tmp_path: Path, replace: bool) -> None:
    final = tmp_path / "final"
    for text in ("old", "new"):
        with atomic_folder(final, replace) as building:
            (building / "a").write_text(text)
    assert (final / "a").read_text() == ("new" if replace else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/final: cannot be written: Not a directory"),
        atomic_folder(tmp_path / "file/final"),
    ):
        raise AssertionError("there is no folder to write into")


def test_a_held_folder_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / LOCK).touch()
    with hold(tmp_path / "index"):
        delete_unless_held(tmp_path / "index")
        assert (tmp_path / "index").is_dir()
    delete_unless_held(tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_what_a_killed_process_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("old", ".old.partial-1", "..old.partial-1.partial-2", ".half_deleted.partial-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).touch()
    (tmp_path / ".half_deleted.partial-3" / LOCK).unlink()
    with held_folder(tmp_path / "new") as building:
        clear_abandoned(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([building, tmp_path / "old"])
        (building / "a").write_text("complete")
    assert sorted(path.name for path in tmp_path.glob("new/*")) == ["a", LOCK]
    delete_unless_held(tmp_path / "new")  # nobody holds it any more
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("anew", [False, True])
def test_a_lock_of_a_deleted_folder_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool) -> None:
    """Another process deletes the folder, or makes it anew, after the file was opened and before it was locked."""
    real, index = fcntl.flock, tmp_path / "index"

    def make() -> None:
        index.mkdir(exist_ok=True)
        (index / LOCK).touch()

    def slow(lock: BinaryIO, operation: int) -> None:
        shutil.rmtree(index)
        if anew:
            make()
        real(lock, operation)

    make()
    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(FileNotFoundError):
        hold(index)
    make()
    delete_unless_held(index)
    assert (index / LOCK).exists() == anew
