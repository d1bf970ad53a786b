"""Checkpoint folders: whole or absent, verified, never executed, old ones cleared."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import CheckpointConfig, Config
from pretrain.checkpoint import MARKER, CheckpointStore, TrainState, load_tensors, load_weights, read_config, verify
from pretrain.parallel import World
from tests.helpers import write_run

WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    (tmp_path / "tokenizer.json").write_text("{}")
    return CheckpointStore(tmp_path / "run", WORLD)


def engine(weights: dict[str, torch.Tensor]) -> Callable[[Path], list[Path]]:
    def save(folder: Path) -> list[Path]:
        path = folder / "engine" / "mp_rank_00_model_states.pt"
        torch.save({"module": weights}, path)
        return [path]

    return save


def save(store: CheckpointStore, config: Config, step: int, save_engine: Callable[[Path], list[Path]] | None = None) -> Path:
    tokenizer = store.folder.parents[1] / "tokenizer.json"
    return store.save(config, TrainState(step, 1, 1), tokenizer, save_engine or engine({"w": torch.ones(3)}))


def test_a_checkpoint_comes_back(store: CheckpointStore, config: Config) -> None:
    torch.manual_seed(5)
    folder = save(store, config, 5)
    drawn = torch.rand(3)
    verify(folder)
    assert read_config(folder) == config
    assert torch.equal(load_weights(folder)["w"], torch.ones(3))
    loaded: list[Path] = []
    assert store.restore(folder, config, folder / "tokenizer.json", loaded.append) == TrainState(5, 1, 1)
    assert loaded == [folder]
    assert torch.equal(torch.rand(3), drawn)  # the generator stands where it stood
    assert (store.folder / "latest").read_text() == "step_00000005\n"


def test_a_failed_save_leaves_the_older_one_and_nothing_else(store: CheckpointStore, config: Config) -> None:
    old = save(store, config, 1)

    def fails(folder: Path) -> list[Path]:
        (folder / "engine" / "half.pt").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match=r"step_00000002: the checkpoint could not be saved .*No space left.*; step 1 is still complete"
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
    assert torch.equal(load_weights(folder)["w"], torch.zeros(3))


def test_retention_keeps_the_last_and_every_mth(store: CheckpointStore, config: Config) -> None:
    for step in range(1, 11):
        save(store, config, step)
        store.clear_old(CheckpointConfig(keep_last=2, keep_every=4))
    assert store.steps() == [4, 8, 9, 10]
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", *(f"step_{step:08d}" for step in (4, 8, 9, 10))]


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
        (lambda f: (f / MARKER).write_text("{"), "complete.json: not a marker"),
        (lambda f: (f / MARKER).write_text("[]"), "complete.json: not a marker"),
        (lambda f: (f / MARKER).write_text('{"format": "other", "files": {}}'), "format 'other' is not supported"),
        (
            lambda f: (f / MARKER).write_text('{"format": "manyheads-checkpoint-1", "files": {"../x": {}}}'),
            "outside the checkpoint",
        ),
        (
            lambda f: (f / MARKER).write_text('{"format": "manyheads-checkpoint-1", "files": {"/x": {}}}'),
            "outside the checkpoint",
        ),
    ],
)
def test_damage_is_named(store: CheckpointStore, config: Config, damage: Callable[[Path], None], expected: str) -> None:
    folder = save(store, config, 1)
    damage(folder)
    with pytest.raises(UserError, match=expected):
        store.restore(folder, config, folder / "tokenizer.json", lambda folder: pytest.fail("a damaged checkpoint was loaded"))


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
    from pretrain.checkpoint import _fingerprint

    marker["files"]["rng/rank_00000.pt"] = _fingerprint(path)
    (folder / MARKER).write_text(json.dumps(marker))
    with pytest.raises(UserError, match=r"rank_00000\.pt: no state of random generators"):
        store.restore(folder, config, folder / "tokenizer.json", lambda folder: None)
