"""The table of a run's checkpoints: each one's state in words."""

from __future__ import annotations

import os
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.checkpoints.store import CheckpointStore
from pretrain.checkpoints.tools.listing import list_checkpoints, listing
from tests.unit.pretrain.checkpoints.layouts import values, write_checkpoint


def states(path: Path) -> dict[str, str]:
    return {row.name: row.status for row in list_checkpoints(path)}


def test_a_run_with_all_that_can_be_in_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 4, 6, 8, 10, 12):
        write_checkpoint(run, "unsharded", values(), step=step)
    store = CheckpointStore(run)
    store.move_aside(2)
    (store.path(4) / "complete.json").unlink()
    for name in ("rank_00000.safetensors", "index.json"):
        (store.path(6) / "engine" / name).unlink()
    os.truncate(store.path(8) / "tokenizer.json", 1)
    (store.path(10) / "complete.json").write_text("{")
    store.make_partial(14)
    (run / "checkpoints/notes").mkdir()
    assert states(run) == {
        "step_00000002.aside": "aside: its run does not use it",
        "step_00000004": "not complete: it has no complete.json",
        "step_00000006": "not complete: engine/rank_00000.safetensors and 1 more file are missing",
        "step_00000008": "damaged: tokenizer.json has another size than was written",
        "step_00000010": "damaged: complete.json: is damaged (Invalid JSON: EOF while parsing an object at line 1 column 1)",
        "step_00000012": "complete, latest",
        ".step_00000014.one_process.partial": "partial: it is being written, or what wrote it was killed",
    }
    assert list(states(run))[-1] == ".step_00000014.one_process.partial"
    assert states(run / "checkpoints") == states(run)


def test_a_row(tmp_path: Path) -> None:
    layout = ("--parallel.tensor=2", "--parallel.zero_stage=2", "--training.precision=bf16")
    folder = write_checkpoint(tmp_path / "run", "zero on 4", values(), *layout, step=1200)
    os.utime(folder / "complete.json", (1.7e9, 1.7e9))
    (row,) = list_checkpoints(folder)
    assert (row.name, row.step, row.status) == ("step_00001200", 1200, "complete")
    assert row.layout == "4 ranks, TP 2 × DP 2, deepspeed ZeRO 2, bf16"
    assert row.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines = listing(tmp_path / "run").splitlines()
    assert lines[0].split() == ["checkpoint", "step", "size", "written", "layout", "state"]
    when = f"{datetime.fromtimestamp(1.7e9):%Y-%m-%d %H:%M}"
    assert lines[1].split("  ")[0] == "step_00001200"
    assert all(text in lines[1] for text in ("1,200", when, row.layout, "complete, latest"))


def test_copies_under_any_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", "unsharded", values())
    shutil.copytree(folder, tmp_path / "archive/best")
    (tmp_path / "archive/other").mkdir()
    assert states(tmp_path / "archive") == {"best": "complete"}


def test_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}: holds no checkpoints$"):
        listing(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path / 'x'}: no such folder$"):
        listing(tmp_path / "x")
