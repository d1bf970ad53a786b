"""Portable checkpoints: what any layout wrote is read whole, and any layout goes on from it as if nothing had been between."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from configs.load import load_config
from data_pipeline.read.manifest import TOKENIZER, read_manifest
from model.gha.voting import Election, LayerElection
from pretrain.checkpoints.portable import KINDS, WholeState, write_portable
from pretrain.checkpoints.store import CheckpointStore, is_portable, read_config, read_state, verify
from pretrain.checkpoints.weights import load_state, load_weights, weight_files
from pretrain.grouping.prune import prune
from pretrain.inference import load_model
from tests.helpers import free_port, launched_as, metrics, named, numbers, run_ranks, write_run

if TYPE_CHECKING:
    from tests.helpers import Opener


CUT, END = 4, 8  # the step of the checkpoint, and the last one
SETTINGS = [  # an odd vocabulary, which tensor-parallel ranks fill up
    f"--training.steps={END}",
    f"--checkpoint.every_steps={CUT}",
    "--validation.every_steps=0",
    "--model.vocab_multiple=7",
    "--optimizer.lr=3e-4",
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "zero0": (1, ["--parallel.zero_stage=0"]),
    "zero2_bf16": (2, ["--parallel.zero_stage=2", "--training.precision=bf16"]),
    "offload_bf16": (2, ["--parallel.zero_stage=3", "--parallel.cpu_offload=true", "--training.precision=bf16"]),
    "zero3": (2, ["--parallel.zero_stage=3"]),
    "pipeline": (2, ["--parallel.pipeline=2"]),
    "pipeline_zero0": (2, ["--parallel.pipeline=2", "--parallel.zero_stage=0"]),
    "pipeline_bf16": (2, ["--parallel.pipeline=2", "--training.precision=bf16"]),
    "tensor": (2, ["--parallel.tensor=2"]),
    "fsdp": (2, ["--backend=fsdp"]),
    "pipeline_tensor": (4, ["--parallel.pipeline=2", "--parallel.tensor=2", "--parallel.sequence=true"]),
    "zero3_tensor": (4, ["--parallel.zero_stage=3", "--parallel.tensor=2"]),
    "fsdp_tensor": (4, ["--backend=fsdp", "--parallel.tensor=2"]),
}
# Where a run comes from: on which layouts it goes on. In bf16 before ZeRO 3, after which a process computes with other kernels.
ON: dict[str, list[str]] = {
    "zero2_bf16": ["zero2_bf16", "offload_bf16", "pipeline_bf16"],
    "zero3": ["zero3", "one", "fsdp_tensor"],
    "pipeline": ["pipeline", "zero3_tensor"],
    "pipeline_zero0": ["zero3"],
    "fsdp": ["fsdp", "pipeline_zero0"],
    "tensor": ["tensor", "fsdp", "zero0"],
    "one": ["one", "pipeline_tensor"],
    "pruned": ["one", "zero3_tensor", "fsdp_tensor"],  # what an election leaves of "one"
}
KEPT = ((0, 1, 4, 7), (2, 3, 5, 6))
GOES_ON = [(source, layout) for source, layouts in ON.items() for layout in layouts if source != "pruned"]


def train(opened: Opener, config_path: Path, layout: str, run: str, resume: Path | None = None) -> None:
    """Train to the end; a run that goes on first saves the step at which it stands."""
    from pretrain.build import build_trainer

    folder = config_path.parent / run
    folder.mkdir(exist_ok=True)
    heads = ["--model.num_heads=4"] if run.startswith("pruned") else []
    config = load_config(config_path, [*SETTINGS, *LAYOUTS[layout][1], *heads, f"--run.folder={folder}"])
    manifest = read_manifest(config.data.path)
    config = config.resolved(manifest.vocab_size, manifest.end_of_document)
    with opened(config.parallel) as own:
        trainer = build_trainer(config, own, CheckpointStore(folder, own), resume)
        trainer.progress.speaks = False
        if resume is not None:
            trainer.save(trainer.step)
        trainer.run()
        trainer.loader.close()


def launched(rank: int, ranks: int, port: int, config: Path) -> None:
    """All that needs so many ranks; the runs that they come from are there already, or made here."""
    with launched_as(rank, ranks, port) as opened:
        for source, layouts in ON.items():
            if source != "pruned" and LAYOUTS[source][0] == ranks:
                train(opened, config, source, source)
                if rank == 0:
                    to_portable(config.parent, source)
            for layout in layouts:
                if LAYOUTS[layout][0] == ranks:
                    train(opened, config, layout, f"{source}_on_{layout}", checkpoint(config.parent / "portable" / source))


def checkpoint(run: Path, step: int = CUT) -> Path:
    return run / f"checkpoints/step_{step:08d}"


def to_portable(root: Path, source: str) -> None:
    folder = checkpoint(root / source)
    tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8")
    state = load_state(folder)
    written = write_portable(root / "portable" / source, read_config(folder), read_state(folder), tokenizer, state)
    assert is_portable(written)
    verify(written)
    assert_equal(load_state(written), state, source)
    if source == "one":
        layers = tuple(LayerElection((0, 0, 0, 0, 1, 1, 1, 1), (1.0,) * 8, kept, (1.0, 1.0)) for kept in KEPT)
        prune(folder, Election(CUT, "value", "votes", 1, 2, 2, layers), root / "portable/pruned")


def assert_equal(found: WholeState, expected: WholeState, name: str) -> None:
    assert found.step == expected.step
    for kind in KINDS:
        assert found.tensors[kind].keys() == expected.tensors[kind].keys()
        for parameter, tensor in found.tensors[kind].items():
            assert torch.equal(tensor, expected.tensors[kind][parameter]), f"{name}: {kind} of {parameter}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    root = tmp_path_factory.mktemp("portable_runs")
    config = write_run(root, prepared)
    for ranks in (2, 1, 4):
        run_ranks(launched, ranks, ranks, free_port(), config, seconds=100)
    return root


@pytest.mark.timeout(400)
def test_all_layouts_have_the_same_state(runs: Path) -> None:
    """FSDP's files hold tensors by name; those of DeepSpeed hold flat groups, in an order that is reconstructed."""
    expected = load_state(checkpoint(runs / "fsdp"))
    assert expected.step == CUT
    for name in (name for name in ON if name != "pruned"):
        found, tolerance = load_state(checkpoint(runs / name)), 2e-2 if "bf16" in name else 1e-5
        for kind in KINDS:
            for parameter, tensor in expected.tensors[kind].items():
                if not parameter.endswith(("key_embedding", "qkv.bias")):  # no gradient but rounding for keys
                    error = (found.tensors[kind][parameter] - tensor).norm() / tensor.norm()
                    assert error < tolerance, f"{name}: {kind} of {parameter} is off by {error:.1e}"


@pytest.mark.parametrize(("source", "layout"), GOES_ON)
def test_a_run_goes_on_as_if_nothing_had_been_between(runs: Path, source: str, layout: str) -> None:
    run = runs / f"{source}_on_{layout}"
    assert_equal(load_state(checkpoint(run)), load_state(checkpoint(runs / source)), "before a step")
    expected = torch.tensor(numbers(metrics(runs / source), "step", "loss", "grad_norm"), dtype=torch.float64)[CUT:]
    found = torch.tensor(numbers(metrics(run), "step", "loss", "grad_norm"), dtype=torch.float64)
    assert found[:, 0].tolist() == list(range(CUT + 1, END + 1))
    other_bf16 = "bf16" in layout and layout != source
    for column, name in ((1, "loss"), (2, "norm")):
        tolerance = (1e-3, 2e-2)[column - 1] if other_bf16 else 1e-6
        torch.testing.assert_close(found[:, column], expected[:, column], rtol=tolerance, atol=0, msg=named(name))


@pytest.mark.parametrize("layout", ON["pruned"])
def test_a_pruned_run_goes_on_with_the_moments_of_its_heads(runs: Path, layout: str) -> None:
    run, whole = runs / f"pruned_on_{layout}", load_state(checkpoint(runs / "one"))
    found = load_state(checkpoint(run))
    for kind in KINDS:
        for layer, kept in enumerate(KEPT):
            name = f"blocks.{layer}.attention.query_embedding"
            assert torch.equal(found.tensors[kind][name], whole.tensors[kind][name][list(kept)])
        assert torch.equal(found.tensors[kind]["final_norm.weight"], whole.tensors[kind]["final_norm.weight"])
    expected = torch.tensor(numbers(metrics(runs / "pruned_on_one"), "step", "loss", "grad_norm"), dtype=torch.float64)
    steps = torch.tensor(numbers(metrics(run), "step", "loss", "grad_norm"), dtype=torch.float64)
    assert steps[:, 0].tolist() == list(range(CUT + 1, END + 1))
    torch.testing.assert_close(steps, expected, rtol=1e-6, atol=0)


def test_a_portable_checkpoint_is_used_without_an_engine(runs: Path) -> None:
    folder = checkpoint(runs / "portable" / "pipeline")
    assert weight_files(folder) == ["engine/whole.safetensors"]
    expected = load_weights(checkpoint(runs / "pipeline"))
    found = load_model(runs / "portable" / "pipeline").model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
