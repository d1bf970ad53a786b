"""Checkpoint folders: whole or absent, verified, never executed, old ones cleared."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.load import load_config
from configs.schema import CheckpointConfig, Config
from pretrain.checkpoints.files import Reader
from pretrain.checkpoints.folder import MARKER, TrainState, read_config, read_marker, read_state, verify
from pretrain.checkpoints.state import Part, State
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.layout import Layout
from tests.helpers import write_run

ONE = Layout()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run", ONE)


def state_of(value: float) -> State:
    return State.unsharded({"model": {"w": torch.full((3,), value)}}, {"step": torch.tensor(1.0)})


def save(
    store: CheckpointStore, config: Config, step: int, state: State | None = None, **more: Callable[[Path], list[Path]]
) -> Path:
    return store.save(config, TrainState(step, 1, "d" * 64), "{}", state or state_of(1.0), **more)


def stored(folder: Path) -> Tensor:
    return Reader(folder / "engine").read("model", "w")


def restore(
    store: CheckpointStore, folder: Path, config: Config, data: str = "d" * 64, tokenizer: str = "{}", world_size: int = 1
) -> State:
    """What is loaded."""
    train, state = store.check(folder, config, data, tokenizer), state_of(0.0)
    store.restore(folder, config, replace(train, world_size=world_size), lambda read: read(state))
    return state


def test_a_checkpoint_comes_back(store: CheckpointStore, config: Config) -> None:
    torch.manual_seed(5)
    folder = save(store, config, 5)
    drawn = torch.rand(3)
    verify(folder)
    assert read_config(folder) == config
    assert read_state(folder) == TrainState(5, 1, "d" * 64)
    assert sorted(read_marker(folder).files) == [
        "config.yaml",
        "engine/index.json",
        "engine/rank_00000.safetensors",
        "rng/rank_00000.safetensors",
        "state.json",
        "tokenizer.json",
    ]
    assert torch.equal(restore(store, folder, config).parts[0].tensor, torch.ones(3))
    assert torch.equal(torch.rand(3), drawn)  # the generator stands where it stood
    assert (store.folder / "latest").read_text() == "step_00000005\n"


def test_a_failed_save_leaves_the_older_one_and_nothing_else(store: CheckpointStore, config: Config) -> None:
    old = save(store, config, 1)

    def fails(folder: Path) -> list[Path]:
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError,
        match=r"step_00000002: the checkpoint could not be saved .*No space left.*; .*step_00000001 is still complete",
    ):
        save(store, config, 2, write_more=fails)
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001"]
    verify(old)
    assert store.find("auto") == old


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
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001"]


def test_a_checkpoint_that_a_killed_process_had_moved_aside_comes_back(store: CheckpointStore, config: Config) -> None:
    old = save(store, config, 1)
    old.rename(store.folder / ".step_00000001.replaced")
    (store.folder / ".step_00000002.replaced").mkdir()  # half deleted
    assert store.find("auto") is None
    store.recover()
    assert store.find("auto") == old
    verify(old)
    store.clear_remains()
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001"]


def test_a_folder_without_its_marker_does_not_count(store: CheckpointStore, config: Config) -> None:
    first, second = save(store, config, 1), save(store, config, 2)
    (second / MARKER).unlink()
    assert store.steps() == [1]
    assert store.find("auto") == first
    with pytest.raises(UserError, match="not a complete checkpoint"):
        verify(second)


def test_saving_a_step_again_replaces_it(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1)
    folder = save(store, config, 1, state_of(2.0))
    verify(folder)
    assert torch.equal(stored(folder), torch.full((3,), 2.0))


def test_retention_keeps_the_last_and_every_mth(store: CheckpointStore, config: Config) -> None:
    for step in range(1, 11):
        save(store, config, step)
        store.clear_old(CheckpointConfig(keep_last=2, keep_every=4))
    assert store.steps() == [4, 8, 9, 10]
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", *(f"step_{step:08d}" for step in (4, 8, 9, 10))]


GENERATORS_FILE = "rng/rank_00000.safetensors"
RECORD = {"bytes": 0, "sha256": ""}


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a checkpoint's marker."""
    marker = json.loads((folder / MARKER).read_text())
    edit(marker)
    (folder / MARKER).write_text(json.dumps(marker))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda f: flip(f / "engine/rank_00000.safetensors"),
            "rank_00000.safetensors: its content is not what was written",
        ),
        (lambda f: flip(f / "engine/index.json"), "index.json: its content is not what was written"),
        (lambda f: (f / "rng/rank_00000.safetensors").write_bytes(b""), "rank_00000.safetensors: has 0 bytes"),
        (lambda f: (f / "engine/rank_00001.safetensors").write_bytes(b""), "does not vouch for engine/rank_00001.safetensors"),
        (lambda f: (f / "config.yaml").unlink(), "config.yaml: missing"),
        (lambda f: (f / MARKER).write_text("{"), "complete.json: is damaged"),
        (lambda f: (f / MARKER).write_text("[]"), "complete.json: is damaged"),
        (lambda f: change(f, lambda marker: marker.update(format="other")), "complete.json: is damaged .format: "),
        (lambda f: change(f, lambda marker: marker.update(files=[])), "complete.json: is damaged .files: "),
        (lambda f: change(f, lambda marker: marker["files"].update(a=3)), "complete.json: is damaged .files.a: "),
        (lambda f: change(f, lambda marker: marker["files"].clear()), "does not vouch for config.yaml, state.json"),
        (lambda f: change(f, lambda marker: marker["files"].update({"../x": RECORD})), "outside the checkpoint"),
        (lambda f: change(f, lambda marker: marker["files"].update({"/x": RECORD})), "outside the checkpoint"),
    ],
)
def test_damage_is_named(store: CheckpointStore, config: Config, damage: Callable[[Path], None], expected: str) -> None:
    folder = save(store, config, 1)
    damage(folder)
    with pytest.raises(UserError, match=expected):
        store.check(folder, config, "d" * 64, "{}")


def test_resuming_before_later_checkpoints_is_refused(store: CheckpointStore, config: Config, tmp_path: Path) -> None:
    first = save(store, config, 1)
    save(store, config, 3)
    with pytest.raises(UserError, match=r"holds checkpoints of later steps \(3\)"):
        store.find(str(first))
    assert store.find("auto") == store.find(str(tmp_path / "run")) == store.path(3)


def test_a_damaged_newest_checkpoint_tells_the_way_to_the_one_before(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1)
    flip(save(store, config, 2) / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml: its content .*; delete it, and --resume=auto resumes from step 1"):
        restore(store, store.path(2), config)


def test_copies_and_remains_beside_the_checkpoints(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 1)
    shutil.copytree(folder, store.folder / "step_00000001_backup")
    (store.folder / ".step_00000009.partial" / "engine").mkdir(parents=True)
    (store.folder / "step_00000002").mkdir()
    assert store.steps() == [1]
    store.clear_remains()
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001", "step_00000001_backup"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_full_disk_leaves_the_older_one_and_nothing_else(store: CheckpointStore, config: Config, alone: bool) -> None:
    old, large = save(store, config, 1), State.unsharded({"model": {"w": torch.ones(20_000)}}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    write = store.save_alone if alone else store.save
    try:
        with pytest.raises(
            UserError,
            match=r"step_00000002: the checkpoint could not be saved .*too large.*; .*step_00000001 is still complete",
        ):
            write(config, TrainState(2, 1, "d" * 64), "{}", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001"]
    verify(old)


def test_a_state_with_gaps_is_not_saved(store: CheckpointStore, config: Config) -> None:
    gap = State([Part("w", "model", (3,), (1,), torch.ones(2))], {})
    with pytest.raises(
        UserError, match=r"could not be saved \(the ranks' parts do not fit together: the parts of model/w do not"
    ):
        save(store, config, 1, gap)
    assert list(store.folder.iterdir()) == []


def test_a_single_process_writes_no_generators(store: CheckpointStore, config: Config) -> None:
    folder = store.save_alone(config, TrainState(1, 1, "d" * 64), "{}", state_of(3.0))
    assert not (folder / "rng").exists()
    before = torch.get_rng_state()
    assert torch.equal(restore(store, folder, config).parts[0].tensor, torch.full((3,), 3.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_layout_keeps_its_own_generators(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 1)
    for change, size in (({"zero_stage": 3}, 1), ({"pipeline": 2}, 1), ({}, 2)):
        torch.rand(3)
        before = torch.get_rng_state()
        other = config.model_copy(update={"parallel": config.parallel.model_copy(update=change)})
        restore(store, folder, other, world_size=size)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_rank_whose_generators_are_missing(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 1)
    (folder / "rng/rank_00000.safetensors").rename(folder / "rng/rank_00001.safetensors")
    change(folder, lambda marker: marker["files"].update({"rng/rank_00001.safetensors": marker["files"].pop(GENERATORS_FILE)}))
    with pytest.raises(UserError, match=r"rank_00000\.safetensors: cannot be read as tensors"):
        restore(store, folder, config)
