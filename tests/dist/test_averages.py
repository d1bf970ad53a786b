"""Averages of the weights on two ranks of every engine, against float64 averages of the weights that each checkpoint holds."""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.checkpoints.files import Reader
from pretrain.checkpoints.folder import read_state
from pretrain.checkpoints.unsharded import Weights
from tests.helpers import free_port, launched_as, resolved, run_ranks, train_here, write_run

if TYPE_CHECKING:
    from tests.helpers import Opener

CUT, END, EVERY = 2, 5, 2  # the step of the checkpoint that runs resume from, the last one, and how often saves are averaged
SETTINGS = (
    f"--training.steps={END}",
    "--checkpoint.keep_last=100",
    "--validation.every_steps=0",
    "--model.vocab_multiple=7",  # an odd vocabulary, which tensor-parallel ranks fill up
)
DECAY = 0.2  # above (n - 1) / (n + 8) up to the third step
EXPONENTIAL = (f"--training.average.decay={DECAY}", "--checkpoint.every_steps=1")
LAST = ("--training.average.last=2", f"--checkpoint.every_steps={EVERY}")
LAYOUTS = {
    "zero0": ["--parallel.zero_stage=0"],
    "zero1_bf16": ["--training.precision=bf16"],
    "zero2": ["--parallel.zero_stage=2"],
    "zero3": ["--parallel.zero_stage=3"],
    "pipeline": ["--parallel.pipeline=2"],
    "tensor": ["--parallel.tensor=2"],
    "fsdp": ["--backend=fsdp"],
    "replicas": ["--backend=fsdp", "--parallel.replicate=2"],
}
# Where a run comes from: on which layouts it resumes. In bf16 before ZeRO 3, after which a process computes with other kernels.
ON: dict[str, dict[str, list[str]]] = {
    "exponential": {
        "zero1_bf16": ["zero1_bf16"],
        "zero2": ["tensor", "replicas"],
        "pipeline": ["zero0"],
        "zero3": ["zero3", "fsdp"],
    },
    "last": {"fsdp": ["fsdp", "pipeline"]},
}
OF = {"exponential": EXPONENTIAL, "last": LAST}
SOURCES = [(kind, source) for kind, sources in ON.items() for source in sources]
RESUMED = [(kind, source, layout) for kind, source in SOURCES for layout in ON[kind][source]]


def train(opened: Opener, config_path: Path, kind: str, layout: str, run: str, resume: Path | None = None) -> None:
    folder = f"--run.folder={config_path.parent / kind / run}"
    train_here(opened, resolved(config_path, [*SETTINGS, *OF[kind], *LAYOUTS[layout], folder], world_size=2), resume)


def train_all(rank: int, port: int, config: Path) -> None:
    with launched_as(rank, 2, port) as opened:
        for kind, source in SOURCES:
            train(opened, config, kind, source, source)
            for layout in ON[kind][source]:
                train(opened, config, kind, layout, f"{source}_on_{layout}", checkpoint(config.parent / kind / source))


def checkpoint(run: Path, step: int = CUT) -> Path:
    return run / f"checkpoints/step_{step:08d}"


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds, unsharded."""
    reader = Reader(folder / "engine")
    return {key: reader.read(*key.split("/")) for key in reader.index.tensors}


@cache
def of_kind(kind: str, run: Path, step: int) -> dict[str, np.ndarray]:
    found = {
        key.removeprefix(f"{kind}/"): tensor
        for key, tensor in tensors(checkpoint(run, step)).items()
        if key.startswith(f"{kind}/")
    }
    return {name: tensor.double().numpy() for name, tensor in found.items()}


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=3e-7, atol=1e-9, err_msg=name)


def exponential(runs: list[Path]) -> dict[str, np.ndarray]:
    """After the last of these steps, each in its run: a sum over all of them, each with the product of what is left of it."""
    left = [min(DECAY, (n - 1) / (n + 8)) for n in range(1, len(runs) + 1)]
    shares = [(1 - left[n]) * np.prod(left[n + 1 :]) for n in range(len(runs))]
    assert np.isclose(sum(shares), 1)
    steps = [of_kind("model", run, step) for step, run in enumerate(runs, start=1)]
    return {name: sum(share * step[name] for share, step in zip(shares, steps, strict=True)) for name in steps[0]}


def of_last_saves(run: Path) -> dict[str, np.ndarray]:
    """Of a run's last step and the save before."""
    one, other = of_kind("model", run, END), of_kind("model", run, END // EVERY * EVERY)
    return {name: (one[name] + other[name]) / 2 for name in one}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    root = tmp_path_factory.mktemp("averages")
    run_ranks(train_all, 2, free_port(), write_run(root, prepared), seconds=200)
    return root


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ON["exponential"])
def test_the_exponential_average_after_every_step(runs: Path, layout: str) -> None:
    run = runs / "exponential" / layout
    for step in range(1, END + 1):
        assert_close(of_kind("average", run, step), exponential([run] * step))
    last, average = (of_kind(kind, run, END)["blocks.0.mlp.up.weight"] for kind in ("model", "average"))
    assert not np.allclose(average, last, rtol=1e-3)


@pytest.mark.parametrize(("kind", "source", "layout"), RESUMED)
def test_a_resumed_average(runs: Path, kind: str, source: str, layout: str) -> None:
    """To the bit on its own layout; on another it has all values, and follows the weights from there on."""
    before, after = runs / kind / source, runs / kind / f"{source}_on_{layout}"
    for step in (CUT, END) if layout == source else (CUT,):  # the latter run has saved its first step again
        expected, found = (tensors(checkpoint(run, step)) for run in (before, after))
        assert found.keys() == expected.keys()
        assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []
    if kind == "exponential":
        assert_close(of_kind("average", after, END), exponential([before] * CUT + [after] * (END - CUT)))
        assert read_state(checkpoint(after, END)).scalars["average_steps"] == END


@pytest.mark.parametrize("run", ["fsdp", "fsdp_on_pipeline"])
def test_the_average_of_the_last_saves(runs: Path, run: str) -> None:
    read = Weights(checkpoint(runs / "last" / run, END), "average")
    assert read.label == "average of 2 saves"
    assert_close({name: read(name).double().numpy() for name in read.shapes}, of_last_saves(runs / "last" / run))


@pytest.mark.parametrize("run", ["exponential/pipeline_on_zero0", "exponential/zero2_on_replicas", "last/fsdp"])
def test_each_rank_averages_about_half_of_the_weights(runs: Path, run: str) -> None:
    """Also where all ranks hold all of them; that each value is in one file only is checked wherever an index is read."""
    index = Reader(checkpoint(runs / run, END) / "engine").index.tensors
    shares, total = [0, 0], sum(prod(entry.shape) for key, entry in index.items() if key.startswith("model/"))
    for key, entry in index.items():
        if key.startswith(("average/", "saved_")):
            for rank, _, size in entry.parts:
                shares[rank] += prod(size)
    assert sum(shares) == total
    assert min(shares) > 0.2 * total
