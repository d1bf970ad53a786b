"""A checkpoint used without an engine: weights and the optimizer's state by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.manifest import file_record
from model.build import unsharded_shapes
from pretrain.checkpoints.folder import MARKER, TrainState, read_config, verify
from pretrain.checkpoints.unsharded import Weights, load_state, load_weights, weight_files
from tests.helpers import write_run
from tests.random_checkpoint import write_checkpoint

KINDS = ("model", "exp_avg", "exp_avg_sq")
INDEX, FILE = "engine/index.json", "engine/rank_00000.safetensors"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)


def tensors_of(config: Config) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = unsharded_shapes(config.model)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in KINDS}


@pytest.fixture
def folder(config: Config) -> Path:
    return write_checkpoint(config, tensors_of(config), TrainState(7, 1, "d" * 64))


def test_it_comes_back(folder: Path, config: Config) -> None:
    expected = tensors_of(config)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        MARKER,
        "config.yaml",
        INDEX,
        FILE,
        "state.json",
        "tokenizer.json",
    ]
    verify(folder)
    assert read_config(folder) == config
    assert (folder / FILE).stat().st_mode & 0o777 == (folder / "config.yaml").stat().st_mode & 0o777
    state = load_state(folder)
    found = state.by_kind()
    assert {name: [float(value) for value in values] for name, values in state.scalars.items()} == {"step": [7.0]}
    assert found.keys() == expected.keys()
    for kind in KINDS:
        assert found[kind].keys() == expected[kind].keys()
        assert all(torch.equal(found[kind][name], tensor) for name, tensor in expected[kind].items())
    weights = load_weights(folder)
    assert weights.keys() == expected["model"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected["model"].items())
    assert weight_files(folder) == [INDEX, FILE]


def averaged(tmp_path: Path, average: str, *kinds: str) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A checkpoint with such an average and kinds of tensors; the tensors."""
    config = load_config(
        write_run(tmp_path, tmp_path / "data"), [f"--training.average={average}", "--checkpoint.every_steps=1"]
    )
    tensors, generator = tensors_of(config := config.resolved(300)), torch.Generator().manual_seed(4)
    for kind in kinds:
        tensors[kind] = {name: torch.randn(weight.shape, generator=generator) for name, weight in tensors["model"].items()}
    return write_checkpoint(config, tensors, TrainState(7, 1, "d" * 64)), tensors


@pytest.mark.parametrize(
    ("average", "kinds", "label"),
    [
        ("{decay: 0.99}", ["average"], "exponential average, decay 0.99"),
        ("{last: 3}", ["saved_1", "saved_2"], "average of 3 saves"),
        ("{last: 3}", ["saved_1"], "average of 2 saves"),
        ("{last: 3}", [], "average of 1 save"),
    ],
)
def test_an_average_is_read_on_request(tmp_path: Path, average: str, kinds: list[str], label: str) -> None:
    folder, tensors = averaged(tmp_path, average, *kinds)
    read = Weights(folder, "average")
    assert (read.label, Weights(folder).label) == (label, "trained")
    of = kinds if kinds == ["average"] else ["model", *kinds]
    found, trained = load_weights(folder, "average"), load_weights(folder)
    assert found.keys() == trained.keys() == tensors["model"].keys()
    for name, weight in tensors["model"].items():
        assert torch.equal(trained[name], weight)
        expected = np.mean([tensors[kind][name].numpy().astype(np.float64) for kind in of], axis=0)
        assert np.array_equal(found[name].numpy(), expected.astype(np.float32))
    assert {part.kind for part in load_state(folder).parts} == {*KINDS, *kinds}
    assert weight_files(folder, "average") == [INDEX, FILE]


def test_a_checkpoint_without_an_average_says_so(folder: Path) -> None:
    message = r"step_00000007: holds no average of the weights, since its run had no training\.average; take the trained ones"
    for use in (Weights, load_weights, weight_files):
        with pytest.raises(UserError, match=message):
            use(folder, "average")


def test_an_average_that_is_not_complete_is_named(tmp_path: Path) -> None:
    folder, _ = averaged(tmp_path, "{decay: 0.99}", "average")
    rewrite(folder, lambda index: index["tensors"].pop("average/final_norm.weight"))
    load_weights(folder)
    for use in (lambda: load_weights(folder, "average"), lambda: load_state(folder)):
        with pytest.raises(UserError, match=r"it misses average/final_norm\.weight"):
            use()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another index, with a marker that vouches for it."""
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    marker = json.loads((folder / MARKER).read_text())
    marker["files"][INDEX] = asdict(file_record(folder / INDEX))
    (folder / MARKER).write_text(json.dumps(marker))


WEIGHT = {"shape": [15], "dtype": "F32", "parts": [[0, [0], [15]]]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index["tensors"].pop("model/final_norm.weight"), "it misses model/final_norm.weight"),
        (lambda index: index["tensors"].update({"model/more": WEIGHT}), "it has besides model/more"),
        (lambda index: index["tensors"].update({"model/final_norm.weight": WEIGHT}), r"F32 \[15\], in this model F32 \[16\]"),
        (lambda index: index["tensors"]["model/final_norm.weight"].update(dtype="BF16"), r"BF16 \[16\], in this model F32"),
    ],
)
def test_weights_of_another_model_are_named(folder: Path, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    rewrite(folder, change)
    verify(folder)
    for use in (Weights, load_state):
        with pytest.raises(UserError, match=rf"engine/index\.json: .*{expected}"):
            use(folder)


def test_the_optimizers_state_is_asked_for_only_where_it_is_used(folder: Path) -> None:
    rewrite(folder, lambda index: index["tensors"].pop("exp_avg/final_norm.weight"))
    load_weights(folder)
    with pytest.raises(UserError, match=r"it misses exp_avg/final_norm\.weight"):
        load_state(folder)


def test_a_flipped_byte_a_truncated_and_a_missing_file(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"rank_00000\.safetensors: its content is not what was written"):
        verify(folder, weight_files(folder))
    (folder / FILE).write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"rank_00000\.safetensors: has \d+ bytes, \d+ were written"):
        verify(folder, weight_files(folder))
    (folder / FILE).write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"rank_00000\.safetensors: cannot be read"):
        load_weights(folder)
    (folder / FILE).unlink()
    with pytest.raises(UserError, match=r"rank_00000\.safetensors: missing from the checkpoint"):
        verify(folder, weight_files(folder))
