"""A soak sees what is wrong: a figure, a step, a value of the state, a file that should not be there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from model.tensor_file import Entry, read_tensors, write_tensors
from tests.random_checkpoint import random_checkpoint
from tests.soak.kills import END, differences
from tests.soak.observed import Observer, phase_of
from tests.soak.pairs import Figures, Outcome, checkpoint, compare_figures, different_tensors

STEP: dict[str, Any] = {"loss": 5.0, "grad_norm": 2.0, "seconds": 0.1}
EXPECTED: Figures = {step: {**STEP, "step": step, "tokens": step * 8} for step in (3, 4, 5)}


def changed(step: int, **values: object) -> Figures:
    found = {number: dict(figures) for number, figures in EXPECTED.items() if number > 3}
    found[step] = {**found.get(step, {}), **values}
    return found


@pytest.mark.parametrize(
    ("found", "limit", "faults"),
    [
        (changed(4, seconds=9.0), 0.0, []),
        (changed(4, loss=5.0 + 4e-6, grad_norm=2.0 - 1e-6), 1e-6, []),
        (changed(4, loss=5.0 + 6e-6), 1e-6, ["step 4: loss 5.000006, not 5.0: off by 1.2e-06"]),
        (changed(5, grad_norm=float("nan")), 1e-6, ["step 5: grad_norm nan, not 2.0: off by nan"]),
        (changed(5, loss=5.0 + 1e-9), 0.0, ["step 5: loss 5.000000001, not 5.0"]),
        (changed(5, tokens=48), 1e-6, ["step 5: tokens 48, not 40"]),
        (changed(5, **{"loss/gha": 0.0}), 1e-6, ["step 5: figures ['loss/gha'] on one side only"]),
        (changed(6), 1e-6, ["steps [4, 5, 6], not [4, 5]"]),
    ],
)
def test_figures(found: Figures, limit: float, faults: list[str]) -> None:
    outcome = Outcome()
    compare_figures(EXPECTED, found, 3, outcome, limit, limit)
    assert outcome.faults == faults


def test_a_value_of_the_optimizer(tmp_path: Path) -> None:
    one = checkpoint(random_checkpoint(tmp_path), 3)
    other = tmp_path / "other"
    shutil.copytree(one, other)
    assert different_tensors(one, other) == []
    file = other / "engine/rank_00000.safetensors"
    stored, _ = read_tensors(file)
    tensors = {name: tensor.clone() for name, tensor in stored.items()}
    tensors["exp_avg/final_norm.bias@0"][5] += 1e-7
    file.unlink()  # `stored` is mapped from it
    write_tensors(file, [Entry.of(name, tensor) for name, tensor in tensors.items()])
    assert different_tensors(one, other) == [f"{other}: exp_avg/final_norm.bias is not what was saved"]


def write_finished(folder: Path) -> Path:
    """A run of two steps, as far as `differences` looks."""
    last = checkpoint(folder, END)
    last.mkdir(parents=True)
    files = {"config.yaml": {"sha256": folder.name}, "state.json": {"sha256": "a"}}
    (last / "complete.json").write_text(json.dumps({"files": files}))
    lines = [{"step": step, "loss": 5.0, "seconds": float(len(folder.name))} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints/latest").write_text(last.name)
    with SummaryWriter(str(folder)) as writer:
        for step in (1, 2):
            writer.add_scalar("loss", 5.0, step)
    return folder


def add_line(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 5.0, "seconds": 1}\n')


def show_again(run: Path) -> None:
    with SummaryWriter(str(run), filename_suffix=".later") as writer:
        writer.add_scalar("loss", 5.0, 2)


def start_again(run: Path) -> None:
    with SummaryWriter(str(run), purge_step=2, filename_suffix=".later") as writer:
        writer.add_scalar("loss", 5.0, 2)


def other_state(run: Path) -> None:
    marker = checkpoint(run, END) / "complete.json"
    marker.write_text(marker.read_text().replace('"a"', '"b"'))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (start_again, None),
        (add_line, "metrics.jsonl of steps [1, 2, 2] is not that of [1, 2], or other figures"),
        (show_again, "TensorBoard shows loss of steps [1, 2, 2], not [1, 2], or other values"),
        (other_state, "state.json is not as in whole"),
        (lambda run: (run / "checkpoints/.step_00000003.partial").mkdir(), "left checkpoints/.step_00000003.partial"),
        (lambda run: (run / ".config.yaml.tmp").touch(), "left .config.yaml.tmp"),
        (lambda run: (run / "checkpoints/latest").write_text("step_21"), "latest names step_21"),
        (lambda run: (run.parent / "data/index/.e0.partial-1").mkdir(parents=True), "left .e0.partial-1"),
    ],
)
def test_what_a_kill_may_not_leave(tmp_path: Path, spoil: Callable[[Path], object], found: str | None) -> None:
    whole, run = (write_finished(tmp_path / name) for name in ("whole", "run"))
    spoil(run)
    faults = differences(whole, run, tmp_path / "data")
    assert [fault.partition(": ")[2] for fault in faults] == ([] if found is None else [found])


WRITE, READ = ("w", os.O_WRONLY), ("rb", os.O_RDONLY)


@pytest.mark.parametrize(
    ("event", "path", "more", "phase"),
    [
        ("open", "run/metrics.jsonl", WRITE, "figures"),
        ("open", "run/metrics.jsonl", READ, None),
        ("os.mkdir", "run/checkpoints/.step_00000003.partial/engine", (), "save"),
        ("open", "run/checkpoints/.step_00000003.partial/state.json", READ, "save"),
        ("os.rename", "run/checkpoints/.step_00000003.partial", ("run/checkpoints/step_00000003",), "commit"),
        ("open", "run/checkpoints/.latest.tmp", WRITE, "commit"),
        ("shutil.rmtree", "run/checkpoints/.step_00000003.deleted", (), "commit"),
        ("open", "run/checkpoints/step_00000003/state.json", READ, "resume"),
        ("os.mkdir", "data/index/.e0.partial-1", (), "index"),
        ("open", "data/train.bin", READ, None),
        ("os.remove", "elsewhere", (), None),
    ],
)
def test_what_an_operation_belongs_to(event: str, path: str, more: tuple[Any, ...], phase: str | None) -> None:
    assert phase_of(path, event, (path, *more), "run", "data") == phase


def test_an_operation_waits_to_be_killed(tmp_path: Path) -> None:
    names = {name: str(tmp_path / name) for name in ("run", "data", "notes", "requested")}
    (tmp_path / "requested.done").touch()
    observer = Observer({**names, "wanted": {"phase": "save", "rank": 0, "count": 2, "waits": True}}, rank=0)
    part = f"{names['run']}/checkpoints/.step_00000003.partial"
    for number, requested in ((1, False), (2, True)):
        observer("os.mkdir", (f"{part}/{number}", 511, -1))
        assert (tmp_path / "requested").exists() == requested
    assert (tmp_path / "notes.0").read_text().splitlines() == [f"save os.mkdir {part}/{number}" for number in (1, 2)]
