"""What a command leaves that is killed while it deletes its own work, in an order that the file system chooses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.sources import ReadOptions
from data_pipeline.prepare.token_writer import TokenWriter


@pytest.fixture
def given(tmp_path: Path) -> PrepareOptions:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number * 7919} of the text" for number in range(200)))
    return PrepareOptions((str(text),), tmp_path / "out", 300, split=(8, 1, 1), read=ReadOptions("line"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("deleted", "seed"), [("identity.json", 5), ("blocks", 1234)])
def test_blocks_of_unknown_options_are_not_taken(
    tmp_path: Path, given: PrepareOptions, monkeypatch: pytest.MonkeyPatch, deleted: str, seed: int
) -> None:
    """Without its identity nobody knows what the rest was for; without its blocks there is nothing to resume from."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(given)
    left = tmp_path / ".out.partial"
    assert list(left.glob("blocks/*.npz"))
    shutil.rmtree(left / deleted) if deleted == "blocks" else (left / deleted).unlink()
    prepare(replace(given, seed=seed))
    prepare(replace(given, seed=seed, output=tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not left.exists()


@pytest.mark.parametrize("error", [MemoryError("12 GiB"), RuntimeError("in a worker process"), UserError("bad line")])
def test_only_an_error_of_the_user_discards_finished_blocks(
    tmp_path: Path, given: PrepareOptions, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "finish", fail)
        with pytest.raises(type(error)):
            prepare(given)
    assert (tmp_path / ".out.partial").exists() == (not isinstance(error, UserError))
    assert (prepare(given).text_bytes == 0) == (not isinstance(error, UserError)), "what is left to encode"


def test_killed_between_the_two_renames_of_overwrite(
    tmp_path: Path, given: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data that was there has a hidden name then, until the next command has the new data in its place."""
    prepare(given)
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        return rename(path, target)

    again = replace(given, seed=5, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(again)
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    prepare(again)
    prepare(replace(again, output=tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "whole"]


def test_the_lock_is_deleted_last(tmp_path: Path, given: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another command would take the folder while this one deletes it."""
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watched(path: Path, ignore_errors: bool = False) -> None:
        if path == tmp_path / ".out.partial":
            seen.append([entry.name for entry in path.iterdir()])
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", watched)
    prepare(given)
    assert seen == [["lock"]]
