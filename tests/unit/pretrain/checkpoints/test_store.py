"""Checkpoint folders: whole or absent, verified, never executed, old ones cleared."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import CheckpointConfig, Config
from data_pipeline.read.manifest import file_record
from pretrain.checkpoints.store import (
    MARKER,
    CheckpointStore,
    TrainState,
    load_tensors,
    read_config,
    verify,
)
from pretrain.distributed.layout import Layout
from tests.helpers import write_run

ONE = Layout()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run", ONE)


def engine(weights: dict[str, torch.Tensor]) -> Callable[[Path], list[Path]]:
    def save(folder: Path) -> list[Path]:
        path = folder / "engine" / "mp_rank_00_model_states.pt"
        torch.save({"module": weights}, path)
        return [path]

    return save


def save(store: CheckpointStore, config: Config, step: int, save_engine: Callable[[Path], list[Path]] | None = None) -> Path:
    return store.save(config, TrainState(step, 1, "d" * 64), "{}", save_engine or engine({"w": torch.ones(3)}))


def stored(folder: Path) -> torch.Tensor:
    weight: torch.Tensor = load_tensors(folder / "engine" / "mp_rank_00_model_states.pt")["module"]["w"]
    return weight


def restore(
    store: CheckpointStore,
    folder: Path,
    config: Config,
    load_engine: Callable[[Path], None],
    data: str = "d" * 64,
    tokenizer: str = "{}",
) -> TrainState:
    state = store.check(folder, config, data, tokenizer)
    store.restore(folder, state, load_engine)
    return state


def test_a_checkpoint_comes_back(store: CheckpointStore, config: Config) -> None:
    torch.manual_seed(5)
    folder = save(store, config, 5)
    drawn = torch.rand(3)
    verify(folder)
    assert read_config(folder) == config
    assert torch.equal(stored(folder), torch.ones(3))
    loaded: list[Path] = []
    assert restore(store, folder, config, loaded.append) == TrainState(5, 1, "d" * 64)
    assert loaded == [folder]
    assert torch.equal(torch.rand(3), drawn)  # the generator stands where it stood
    assert (store.folder / "latest").read_text() == "step_00000005\n"


def test_a_failed_save_leaves_the_older_one_and_nothing_else(store: CheckpointStore, config: Config) -> None:
    old = save(store, config, 1)

    def fails(folder: Path) -> list[Path]:
        (folder / "engine" / "half.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError,
        match=r"step_00000002: the checkpoint could not be saved .*No space left.*; .*step_00000001 is still complete",
    ):
        save(store, config, 2, fails)
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001"]
    verify(old)
    assert store.find("auto") == old


def test_a_folder_without_its_marker_does_not_count(store: CheckpointStore, config: Config) -> None:
    first, second = save(store, config, 1), save(store, config, 2)
    (second / MARKER).unlink()
    assert store.steps() == [1]
    assert store.find("auto") == first
    with pytest.raises(UserError, match="not a complete checkpoint"):
        verify(second)


def test_saving_a_step_again_replaces_it(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1)
    folder = save(store, config, 1, engine({"w": torch.zeros(3)}))
    verify(folder)
    assert torch.equal(stored(folder), torch.zeros(3))


def test_retention_keeps_the_last_and_every_mth(store: CheckpointStore, config: Config) -> None:
    for step in range(1, 11):
        save(store, config, step)
        store.clear_old(CheckpointConfig(keep_last=2, keep_every=4))
    assert store.steps() == [4, 8, 9, 10]
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", *(f"step_{step:08d}" for step in (4, 8, 9, 10))]


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
            lambda f: flip(f / "engine/mp_rank_00_model_states.pt"),
            "mp_rank_00_model_states.pt: its content is not what was written",
        ),
        (lambda f: (f / "rng/rank_00000.pt").write_bytes(b""), "rank_00000.pt: has 0 bytes"),
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
        restore(store, folder, config, lambda folder: pytest.fail("a damaged checkpoint was loaded"))


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    canary = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (canary,))

    path = tmp_path / "shard.pt"
    for content in (pickle.dumps(Payload()), None):
        if content is None:
            torch.save({"module": Payload()}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"shard\.pt: cannot be read as tensors"):
            load_tensors(path)
    assert not canary.exists()


def test_generators_of_another_kind_are_refused(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 1)
    path = folder / "rng/rank_00000.pt"
    torch.save({"cpu": torch.zeros(3)}, path)
    marker = json.loads((folder / MARKER).read_text())
    marker["files"]["rng/rank_00000.pt"] = asdict(file_record(path))
    (folder / MARKER).write_text(json.dumps(marker))
    with pytest.raises(UserError, match=r"rank_00000\.pt: no state of random generators"):
        restore(store, folder, config, lambda folder: None)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("run.seed", 99, "run.seed: 1234 there, 99 here"),
        ("training.global_batch_size", 4, "training.global_batch_size: 8 there, 4 here"),
        ("training.precision", "bf16", "training.precision: 'fp32' there, 'bf16' here"),
        ("data.sequence_length", 8, "data.sequence_length: 16 there, 8 here"),
        ("parallel.zero_stage", 2, "parallel.zero_stage: 1 there, 2 here"),
        ("model.num_heads", 4, "model.num_heads: 8 there, 4 here"),
    ],
)
def test_what_a_run_may_not_change_when_it_goes_on(
    store: CheckpointStore, config: Config, field: str, value: object, expected: str
) -> None:
    folder = save(store, config, 1)
    section, _, name = field.partition(".")
    changed = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    with pytest.raises(UserError) as caught:
        restore(store, folder, changed, lambda folder: pytest.fail("loaded"))
    assert str(caught.value).endswith(f"cannot go on from\n  {expected}")


def test_sequence_parallelism_may_change_only_where_it_has_no_effect(store: CheckpointStore, config: Config) -> None:
    def with_parallel(**fields: object) -> Config:
        return config.model_copy(update={"parallel": config.parallel.model_copy(update=fields)})

    folder = save(store, config, 1)
    restore(store, folder, with_parallel(sequence=True), lambda folder: None)
    with pytest.raises(UserError, match=r"parallel.tensor: 1 there, 2 here\n  parallel.sequence: False there, True here"):
        restore(store, folder, with_parallel(tensor=2, sequence=True), lambda folder: pytest.fail("loaded"))


def test_other_data_and_other_tokenizers_are_refused(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 1)
    with pytest.raises(UserError, match="other data than"):
        restore(store, folder, config, lambda folder: pytest.fail("loaded"), data="e" * 64)
    with pytest.raises(UserError, match="another tokenizer than"):
        restore(store, folder, config, lambda folder: pytest.fail("loaded"), tokenizer="{ }")


def test_resuming_before_later_checkpoints_is_refused(store: CheckpointStore, config: Config, tmp_path: Path) -> None:
    first = save(store, config, 1)
    save(store, config, 3)
    with pytest.raises(UserError, match=r"holds checkpoints of later steps \(3\)"):
        store.find(str(first))
    assert store.find("auto") == store.find(str(tmp_path / "run")) == store.path(3)


def test_a_damaged_newest_checkpoint_tells_the_way_to_the_one_before(store: CheckpointStore, config: Config) -> None:
    save(store, config, 1)
    flip(save(store, config, 2) / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml: its content .*; delete it, and --resume=auto goes on from step 1"):
        restore(store, store.path(2), config, lambda folder: pytest.fail("loaded"))


def test_copies_and_remains_beside_the_checkpoints(store: CheckpointStore, config: Config) -> None:
    folder = save(store, config, 1)
    shutil.copytree(folder, store.folder / "step_00000001_backup")
    (store.folder / ".step_00000009.partial" / "engine").mkdir(parents=True)
    (store.folder / "step_00000002").mkdir()
    assert store.steps() == [1]
    store.clear_remains()
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step_00000001", "step_00000001_backup"]
