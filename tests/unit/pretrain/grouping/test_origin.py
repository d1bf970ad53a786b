"""The note in a pruned run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.grouping.origin import read_origin, write_origin


def test_the_note_holds_wherever_both_folders_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/my/pruned").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_origin(Path("runs/my/pruned"), Path("runs/my"), 7)
    assert read_origin(Path("runs/my/pruned")) == (Path("runs/my"), 7)
    shutil.move("runs", "moved")
    monkeypatch.chdir("/")
    assert read_origin(tmp_path / "moved/my/pruned") == (tmp_path / "moved/my", 7)
    (tmp_path / "elsewhere").mkdir()
    write_origin(tmp_path / "elsewhere", tmp_path / "moved/my", 9)
    assert read_origin(tmp_path / "elsewhere") == (tmp_path / "moved/my", 9)


def test_other_runs_have_none_and_damage_is_named(tmp_path: Path) -> None:
    assert read_origin(tmp_path) is None
    (tmp_path / "pruned_from.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"pruned_from\.json: is damaged"):
        read_origin(tmp_path)
