"""Portable checkpoints on disk: written whole or not at all, read as shards, fitting every layout of their own model only."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.manifest import file_record
from model.build import unsharded_shapes
from pretrain.checkpoints.portable import KINDS, WholeFile, WholeState, write_portable
from pretrain.checkpoints.store import MARKER, CheckpointStore, TrainState, is_portable, read_config, verify
from pretrain.checkpoints.weights import load_state, load_weights, weight_files
from pretrain.distributed.layout import Layout
from tests.helpers import write_run

ONE = Layout()
FILE = "engine/whole.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)


def state_of(config: Config) -> WholeState:
    generator = torch.Generator().manual_seed(3)
    shapes = unsharded_shapes(config.model)
    return WholeState(
        {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in KINDS}, step=7
    )


def save(config: Config, step: int = 7, state: WholeState | None = None) -> Path:
    folder = Path(config.run.folder)
    return write_portable(folder, config, TrainState(step, 1, "d" * 64), "{}", state or state_of(config))


def test_it_comes_back(config: Config) -> None:
    folder, expected = save(config), state_of(config)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        MARKER,
        "config.yaml",
        FILE,
        "state.json",
        "tokenizer.json",
    ]
    assert is_portable(folder)
    verify(folder)
    assert read_config(folder) == config
    assert (folder / FILE).stat().st_mode & 0o777 == (folder / "config.yaml").stat().st_mode & 0o777
    assert (folder.parent / "latest").read_text() == f"{folder.name}\n"
    found = load_state(folder)
    assert found.step == 7
    for kind in KINDS:
        assert all(torch.equal(found.tensors[kind][name], tensor) for name, tensor in expected.tensors[kind].items())
    weights = load_weights(folder)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.tensors["model"].items())
    assert weight_files(folder) == [FILE]


def test_the_file_has_the_documented_names(config: Config) -> None:
    tensors = load_file(save(config) / FILE)
    names = [f"{kind}.{name}" for kind in ("model", "exp_avg", "exp_avg_sq") for name in unsharded_shapes(config.model)]
    assert tensors.keys() == {*names, "step"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_a_rank_reads_its_shard(config: Config) -> None:
    folder, expected = save(config), state_of(config).tensors["exp_avg"]
    name, (rows, columns) = "blocks.1.mlp.up.weight", unsharded_shapes(config.model)["blocks.1.mlp.up.weight"]
    for rank in range(2):
        shard = WholeFile(folder, config.model, rank).shard("exp_avg", name, torch.Size([rows // 2, columns]))
        assert torch.equal(shard, expected[name].chunk(2)[rank])


def test_every_layout_of_the_same_model_may_go_on(config: Config) -> None:
    folder, store = save(config), CheckpointStore(Path(config.run.folder), ONE)

    def check(now: Config) -> TrainState:
        return store.check(folder, now, "d" * 64, "{}")

    layouts: list[dict[str, Any]] = [
        {"zero_stage": 3},
        {"tensor": 2, "sequence": True},
        {"pipeline": 2, "zero_stage": 0},
    ]
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 9})})
    for layout in layouts:
        assert check(longer.model_copy(update={"parallel": config.parallel.model_copy(update=layout)})).step == 7
    bf16 = longer.training.model_copy(update={"precision": "bf16"})
    check(longer.model_copy(update={"backend": "fsdp", "training": bf16}))
    with pytest.raises(UserError, match=r"cannot go on from\n  model\.num_heads: 8 there, 4 here$"):
        check(longer.model_copy(update={"model": config.model.model_copy(update={"num_heads": 4})}))
    with pytest.raises(UserError, match=r"beyond training\.steps"):
        check(config)


def test_generators_stay_as_they_are(config: Config) -> None:
    folder, store = save(config, step=3), CheckpointStore(Path(config.run.folder), ONE)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    state = store.check(folder, config, "d" * 64, "{}")
    loaded: list[Path] = []
    store.restore(folder, state, loaded.append)
    assert loaded == [folder]
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_full_disk_leaves_the_older_one_and_nothing_else(config: Config) -> None:
    old = save(config, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"step_00000002: the checkpoint could not be saved .*; .*step_00000001 is still comp"
        ):
            save(config, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in old.parent.iterdir()) == ["latest", "step_00000001"]
    verify(old)


def test_a_step_saved_again_is_replaced(config: Config) -> None:
    save(config)
    other = state_of(config)
    folder = save(config, state=WholeState(other.tensors, step=8))
    assert load_state(folder).step == 8
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", folder.name]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Another content of the file, with a marker that vouches for it."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
    marker = json.loads((folder / MARKER).read_text())
    marker["files"][FILE] = asdict(file_record(folder / FILE))
    (folder / MARKER).write_text(json.dumps(marker))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors.pop("exp_avg.final_norm.weight"), "exp_avg.final_norm.weight"),
        (lambda tensors: tensors.pop("step"), "step"),
        (lambda tensors: tensors.update({"model.more": torch.zeros(1)}), "model.more"),
        (lambda tensors: tensors.update({"model.final_norm.weight": torch.zeros(15)}), "model.final_norm.weight"),
        (lambda tensors: tensors.update({"exp_avg.final_norm.bias": torch.zeros(16).bfloat16()}), "exp_avg.final_norm.bias"),
    ],
)
def test_content_of_another_model_is_named(
    config: Config, change: Callable[[dict[str, Tensor]], object], expected: str
) -> None:
    folder = save(config)
    rewrite(folder, change)
    with pytest.raises(UserError, match=rf"whole\.safetensors: does not hold what its config\.yaml describes \({expected}\)"):
        load_state(folder)


def test_what_is_no_such_file_is_named(config: Config) -> None:
    folder = save(config)
    (folder / FILE).write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"whole\.safetensors: cannot be read"):
        load_weights(folder)
    (folder / FILE).unlink()
    with pytest.raises(UserError, match=r"whole\.safetensors: missing from the checkpoint"):
        verify(folder)
