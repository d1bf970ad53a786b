"""What `--resume` finds, what it refuses, and what it loads, on one process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.manifest import file_record
from pretrain.checkpoints.folder import MARKER, DamagedError, TrainState
from pretrain.checkpoints.resume import Resumer, Start
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.state import State
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.layout import Layout
from tests.helpers import write_run

ONE = Layout()
RANK_FILE = "engine/rank_00000.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data"), ["--training.steps=20"]).resolved(300)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run")


def state_of(value: float, step: float = 0.0) -> State:
    return State.unsharded({"model": {"w": torch.full((3,), float(value))}}, {"step": torch.tensor(step)})


def save(store: CheckpointStore, config: Config, *steps: int) -> Path:
    """Checkpoints whose weights are their step; the last one's folder."""
    saver = Saver(store, ONE, config, "d" * 64, "{}")
    for step in steps:
        saver.begin(step, state_of(step, step))
        folder = saver.finish()
    saver.close()
    return folder


def resumer(store: CheckpointStore, config: Config, data: str = "d" * 64, tokenizer: str = "{}") -> Resumer:
    return Resumer(store, ONE, config, data, tokenizer)


def found(store: CheckpointStore, config: Config, resume: str) -> Path | None:
    start = resumer(store, config).find(resume)
    return None if start is None else start.folder


def restored(store: CheckpointStore, config: Config, start: Start) -> State:
    state = state_of(0.0)
    resumer(store, config).restore(start, lambda read: read(state))
    return state


def test_auto_takes_the_newest(store: CheckpointStore, config: Config) -> None:
    assert found(store, config, "auto") is None
    save(store, config, 3, 12, 5)
    assert found(store, config, "auto") == store.path(12)


def test_another_runs_folder_and_a_checkpoint_can_be_named(store: CheckpointStore, config: Config, tmp_path: Path) -> None:
    other = CheckpointStore(tmp_path / "other")
    save(other, config, 4, 6)
    assert found(store, config, str(tmp_path / "other")) == other.path(6)
    assert found(store, config, str(other.path(4))) == other.path(4)


def test_an_earlier_checkpoint_by_its_path_is_refused_and_by_its_step_taken(
    store: CheckpointStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, config, 3, 6, 7)
    later = r"run/checkpoints: holds checkpoints of later steps \(6, 7\); pass --resume=step:3 to move them aside, or choose"
    with pytest.raises(UserError, match=later):
        found(store, config, str(store.path(3)))
    assert found(store, config, str(store.path(7))) == store.path(7)
    with pytest.raises(UserError, match=r"^--resume=step:4: .*/checkpoints has no checkpoint of that step; it has: 3, 6, 7$"):
        found(store, config, "step:4")
    start = resumer(store, config).find("step:3")
    assert start is not None
    assert (start.folder, store.steps()) == (store.path(3), [3, 6, 7])  # nothing is moved until the run starts
    aside = resumer(store, config).leave_later(start, "step:3")
    assert [path.name for path in aside] == ["step_00000006.aside", "step_00000007.aside"]
    assert (store.steps(), (store.folder / "latest").read_text()) == ([3], "step_00000003\n")
    assert restored(store, config, start).parts[0].tensor.tolist() == [3.0] * 3
    save(store, config, 5)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert found(store, config, "step:3") == store.path(5)  # the launcher's second try keeps what the first one has saved
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert found(store, config, "step:3") == store.path(3)  # a new command goes back


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "no such checkpoint folder"),
        ("checkpoints", "holds no complete checkpoint"),
        ("more", "not a complete checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    store: CheckpointStore, config: Config, tmp_path: Path, made: str | None, message: str
) -> None:
    place = tmp_path / "place"
    if made is not None:
        (place / made).mkdir(parents=True)
    with pytest.raises(UserError, match=f"^{place}: {message}"):
        found(store, config, str(place))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a checkpoint's marker."""
    marker = json.loads((folder / MARKER).read_text())
    edit(marker)
    (folder / MARKER).write_text(json.dumps(marker))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


RECORD = {"bytes": 0, "sha256": ""}
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: flip(f / RANK_FILE), "rank_00000.safetensors: its content is not what was written"),
    (lambda f: os.truncate(f / RANK_FILE, 100), r"rank_00000.safetensors: has 100 bytes, \d+ were written \(truncated"),
    (lambda f: (f / RANK_FILE).unlink(), "rank_00000.safetensors: missing"),
    (lambda f: flip(f / "engine/index.json"), "index.json: its content is not what was written"),
    (lambda f: flip(f / "state.json"), "state.json: its content is not what was written"),
    (lambda f: (f / "engine/rank_00001.safetensors").write_bytes(b""), "does not vouch for engine/rank_00001.safetensors"),
    (lambda f: (f / "config.yaml").unlink(), "config.yaml: missing"),
    (lambda f: (f / MARKER).unlink(), r"step_00000002: not a complete checkpoint of manyheads \(no complete.json\)"),
    (lambda f: (f / MARKER).write_text("{"), "complete.json: is damaged"),
    (lambda f: (f / MARKER).write_text("[]"), "complete.json: is damaged"),
    (lambda f: change(f, lambda marker: marker.update(format="other")), "complete.json: is damaged .format: "),
    (lambda f: change(f, lambda marker: marker.update(files=[])), "complete.json: is damaged .files: "),
    (lambda f: change(f, lambda marker: marker["files"].update(a=3)), "complete.json: is damaged .files.a: "),
    (lambda f: change(f, lambda marker: marker["files"].clear()), "does not vouch for config.yaml, state.json"),
    (lambda f: change(f, lambda marker: marker["files"].update({"../x": RECORD})), "outside the checkpoint"),
    (lambda f: change(f, lambda marker: marker["files"].update({"/x": RECORD})), "outside the checkpoint"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGE)
def test_damage_is_named_and_auto_takes_the_checkpoint_before(
    store: CheckpointStore, config: Config, damage: Callable[[Path], object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(store, config, 1)
    folder = save(store, config, 2)
    damage(folder)
    for resume in (str(folder), "step:2"):
        with pytest.raises(DamagedError, match=expected):
            found(store, config, resume)
    assert store.folder.joinpath("step_00000002").is_dir()
    start = resumer(store, config).find("auto")
    assert start is not None
    assert start.folder == store.path(1)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert warning.endswith(f"; kept as {folder}.aside, an earlier checkpoint takes its place")
    assert (store.folder / "step_00000002.aside").is_dir()
    assert restored(store, config, start).parts[0].tensor.tolist() == [1.0] * 3


def test_several_damaged_ones(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1, 2, 3)
    (store.path(2) / MARKER).unlink()
    flip(store.path(3) / RANK_FILE)
    assert found(store, config, "auto") == store.path(1)
    assert sorted(path.name for path in store.folder.glob("*.aside")) == ["step_00000002.aside", "step_00000003.aside"]


def test_the_only_checkpoint_is_not_taken_for_none(store: CheckpointStore, config: Config) -> None:
    flip(save(store, config, 2) / RANK_FILE)
    with pytest.raises(
        UserError, match=r"not what was written \(corrupt\); the run has no earlier checkpoint: delete .*_00000002"
    ):
        found(store, config, "auto")
    assert store.steps() == [2]


def test_what_does_not_fit_is_no_damage(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1, 2)
    with pytest.raises(UserError, match="other data than"):
        resumer(store, config, data="e" * 64).find("auto")
    assert store.steps() == [1, 2]


def test_a_file_that_cannot_be_read_is_no_damage(
    store: CheckpointStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server that does not answer must not cost a checkpoint."""
    save(store, config, 1, 2)

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pretrain.checkpoints.folder.file_record", fails)
    with pytest.raises(UserError, match="Input/output error"):
        found(store, config, "auto")
    assert store.steps() == [1, 2]


def test_a_run_draws_on_where_it_stood(store: CheckpointStore, config: Config) -> None:
    torch.manual_seed(5)
    save(store, config, 7)
    drawn = torch.rand(3)
    start = resumer(store, config).find("auto")
    assert start is not None
    state = restored(store, config, start)
    assert torch.equal(torch.rand(3), drawn)
    assert (state.parts[0].tensor.tolist(), state.scalar_values()) == ([7.0] * 3, {"step": 7.0})


def test_a_checkpoint_of_one_process_has_no_generators(store: CheckpointStore, config: Config) -> None:
    folder = store.save_alone(config, TrainState(3, 1, "d" * 64), "{}", state_of(3.0))
    start = resumer(store, config).check([folder])
    before = torch.get_rng_state()
    assert restored(store, config, start).parts[0].tensor.tolist() == [3.0] * 3
    assert torch.equal(torch.get_rng_state(), before)


def test_another_layout_keeps_its_own_generators(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1)
    start = resumer(store, config).find("auto")
    assert start is not None
    for fields, size in (({"zero_stage": 3}, 1), ({"pipeline": 2}, 1), ({}, 2)):
        torch.rand(3)
        before = torch.get_rng_state()
        other = config.model_copy(update={"parallel": config.parallel.model_copy(update=fields)})
        restored(store, other, replace(start, train=replace(start.train, world_size=size)))
        assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_passes_its_hash_but_holds_something_else(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 1)
    (folder / RANK_FILE).write_bytes(b"no tensors")
    record = file_record(folder / RANK_FILE)
    change(folder, lambda marker: marker["files"].update({RANK_FILE: {"bytes": record.bytes, "sha256": record.sha256}}))
    start = resumer(store, config).find("auto")
    assert start is not None
    with pytest.raises(UserError, match=r"rank_00000\.safetensors: cannot be read"):
        restored(store, config, start)


def test_a_missing_number_of_the_optimizer(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1)
    start = resumer(store, config).find("auto")
    assert start is not None
    with pytest.raises(UserError, match="does not hold the optimizer's step"):
        restored(store, config, replace(start, train=replace(start.train, scalars={})))


def test_a_copied_checkpoint_is_as_good(store: CheckpointStore, config: Config, tmp_path: Path) -> None:
    shutil.copytree(save(store, config, 1), tmp_path / "elsewhere")
    assert found(store, config, str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
