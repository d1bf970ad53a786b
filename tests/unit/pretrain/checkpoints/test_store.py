"""The folders of a run's checkpoints: complete or absent, never mixed up, old ones cleared."""

from __future__ import annotations

import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import CheckpointConfig, Config
from pretrain.checkpoints.files import Reader
from pretrain.checkpoints.folder import (
    MARKER,
    TrainState,
    all_steps,
    newest_checkpoint,
    read_config,
    read_marker,
    read_state,
    verify,
)
from pretrain.checkpoints.state import State
from pretrain.checkpoints.store import CheckpointStore
from tests.helpers import write_run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run")


def state_of(value: float) -> State:
    return State.unsharded({"model": {"w": torch.full((3,), value)}}, {"step": torch.tensor(4.0)})


def save(store: CheckpointStore, config: Config, step: int, state: State | None = None) -> Path:
    return store.save_alone(config, TrainState(step, 1, "d" * 64), "{}", state or state_of(1.0))


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_checkpoint_of_one_process(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 5)
    verify(folder)
    assert read_config(folder) == config
    assert read_state(folder) == replace(TrainState(5, 1, "d" * 64), scalars={"step": 4.0})
    assert sorted(read_marker(folder).files) == [
        "config.yaml",
        "engine/index.json",
        "engine/rank_00000.safetensors",
        "state.json",
        "tokenizer.json",
    ]
    assert torch.equal(Reader(folder / "engine").read("model", "w"), torch.ones(3))
    assert (store.folder / "latest").read_text() == "step_00000005\n"


def test_a_step_that_cannot_replace_its_older_checkpoint_leaves_that(
    store: CheckpointStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(store, config, 1)
    content = (old / MARKER).read_bytes()
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match=r"step_00000001: the checkpoint could not be saved .* is still complete"):
        save(store, config, 1)
    assert (old / MARKER).read_bytes() == content
    assert names(store) == ["latest", "step_00000001"]


def test_a_checkpoint_that_a_killed_process_was_replacing_comes_back(store: CheckpointStore, config: Config) -> None:
    old = save(store, config, 1)
    old.rename(store.folder / ".step_00000001.replaced")
    (store.folder / ".step_00000002.replaced").mkdir()  # half deleted
    assert store.newest() is None
    store.recover()
    assert store.newest() == old
    verify(old)
    store.clear_remains()
    assert names(store) == ["latest", "step_00000001"]


def test_a_folder_without_its_marker_does_not_count(store: CheckpointStore, config: Config) -> None:
    first, second = save(store, config, 1), save(store, config, 2)
    (second / MARKER).unlink()
    assert (store.steps(), all_steps(store.folder), store.newest()) == ([1], [1, 2], first)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        verify(second)
    message = f"^{second}: not a complete checkpoint .no complete.json.; name an earlier one, such as {first}$"
    with pytest.raises(UserError, match=message):  # not silently an older one
        newest_checkpoint(store.folder.parent)


def test_saving_a_step_again_replaces_it(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1)
    folder = save(store, config, 1, state_of(2.0))
    verify(folder)
    assert torch.equal(Reader(folder / "engine").read("model", "w"), torch.full((3,), 2.0))


def test_retention_keeps_the_last_and_every_mth(store: CheckpointStore, config: Config) -> None:
    for step in range(1, 11):
        save(store, config, step)
        for folder in store.take_old(CheckpointConfig(keep_last=2, keep_every=4)):
            assert folder.parent == store.folder
            if step < 9:
                shutil.rmtree(folder)
    assert store.steps() == [4, 8, 9, 10]
    kept = ["latest", *(f"step_{step:08d}" for step in (4, 8, 9, 10))]
    assert names(store) == [".step_00000007.deleted", *kept]
    store.clear_remains()  # of a process that was killed before it had deleted all
    assert names(store) == kept


def test_a_process_killed_before_latest_named_its_checkpoint(store: CheckpointStore, config: Config) -> None:
    for step in (1, 2):
        save(store, config, step)
    (store.folder / "latest").write_text("step_00000001\n")
    (store.folder / ".latest.tmp").write_text("step_000")
    store.clear_remains()
    assert (store.folder / "latest").read_text() == "step_00000002\n"
    assert names(store) == ["latest", "step_00000001", "step_00000002"]


def test_what_is_moved_aside_stays_and_does_not_count(store: CheckpointStore, config: Config) -> None:
    for number in ("", "-2", "-3"):
        save(store, config, 1)
        save(store, config, 2)
        assert store.move_aside(2).name == f"step_00000002.aside{number}"
    store.point_to_newest()
    store.clear_remains()
    assert (store.steps(), (store.folder / "latest").read_text()) == ([1], "step_00000001\n")
    kept = [f"step_00000002.aside{number}" for number in ("", "-2", "-3")]
    assert names(store) == ["latest", "step_00000001", *kept]


def test_copies_and_remains_beside_the_checkpoints(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 1)
    shutil.copytree(folder, store.folder / "step_00000001_backup")
    (store.folder / ".step_00000009.partial" / "engine").mkdir(parents=True)
    (store.folder / "step_00000002").mkdir()
    assert store.steps() == [1]
    store.clear_remains()
    assert names(store) == ["latest", "step_00000001", "step_00000001_backup", "step_00000002"]


def test_a_full_disk_leaves_the_older_one_and_nothing_else(store: CheckpointStore, config: Config) -> None:
    old, large = save(store, config, 1), State.unsharded({"model": {"w": torch.ones(20_000)}}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    message = r"step_00000002: the checkpoint could not be saved .*too large.*; .*step_00000001 is still complete"
    try:
        with pytest.raises(UserError, match=message):
            save(store, config, 2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(store) == ["latest", "step_00000001"]
    verify(old)
