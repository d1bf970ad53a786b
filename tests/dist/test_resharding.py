"""What any layout wrote is read unsharded, and any other layout resumes from it as if the run had kept its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from model.gha.voting import Election, LayerElection
from pretrain.checkpoints.unsharded import load_state, load_weights, weight_files
from pretrain.grouping.prune import prune
from pretrain.inference import load_model
from tests.helpers import free_port, launched_as, metrics, named, numbers, resolved, run_ranks, train_here, write_run

if TYPE_CHECKING:
    from tests.helpers import Opener


CUT, END = 2, 4  # the step of the checkpoint, and the last one: its loss comes of moments that were read
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
    "fsdp_hybrid": (4, ["--backend=fsdp", "--parallel.replicate=2"]),
}
# Where a run comes from: on which other layouts it resumes. In bf16 before ZeRO 3, after which a process computes with other
# kernels. tests/dist/test_soak.py has others, drawn; tests/dist/test_resume.py a run's own layout.
ON: dict[str, list[str]] = {
    "zero2_bf16": ["offload_bf16", "pipeline_bf16", "one"],
    "zero3": ["one", "fsdp_tensor"],
    "pipeline": ["zero3_tensor"],
    "pipeline_zero0": ["zero3"],
    "fsdp": ["pipeline_zero0"],
    "fsdp_hybrid": ["pipeline_tensor"],
    "tensor": ["fsdp", "zero0"],
    "pipeline_tensor": ["one", "fsdp_hybrid"],
    "fsdp_tensor": ["tensor"],
    "one": ["pipeline_tensor"],
    "pruned": ["one", "zero3_tensor", "fsdp_tensor"],  # what an election leaves of "one"
}
KEPT = ((0, 1, 4, 7), (2, 3, 5, 6))
RESUMED = [(source, layout) for source, layouts in ON.items() for layout in layouts if source != "pruned"]


def train(opened: Opener, config_path: Path, layout: str, run: str, resume: Path | None = None) -> None:
    heads = ["--model.num_heads=4"] if run.startswith("pruned") else []
    folder = f"--run.folder={config_path.parent / run}"
    train_here(opened, resolved(config_path, [*SETTINGS, *LAYOUTS[layout][1], *heads, folder]), resume)


def start(rank: int, ranks: int, port: int, config: Path) -> None:
    """The runs of so many ranks that others come from."""
    with launched_as(rank, ranks, port) as opened:
        for source in ON:
            if source != "pruned" and LAYOUTS[source][0] == ranks:
                train(opened, config, source, source)
                if source == "one":
                    layers = tuple(LayerElection((0, 0, 0, 0, 1, 1, 1, 1), (1.0,) * 8, kept, (1.0, 1.0)) for kept in KEPT)
                    election = Election(CUT, "value", "votes", 1, 2, 2, layers)
                    prune(checkpoint(config.parent / source), election, config.parent / "pruned")


def resume(rank: int, ranks: int, port: int, config: Path) -> None:
    """The runs of so many ranks that come from others."""
    with launched_as(rank, ranks, port) as opened:
        for source, layouts in ON.items():
            for layout in layouts:
                if LAYOUTS[layout][0] == ranks:
                    train(opened, config, layout, f"{source}_on_{layout}", checkpoint(config.parent / source))


def checkpoint(run: Path, step: int = CUT) -> Path:
    return run / f"checkpoints/step_{step:08d}"


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint has of model and optimizer, unsharded, by kind and name."""
    state = load_state(folder)
    assert {name: [float(value) for value in values] for name, values in state.scalars.items()} == {"step": [CUT]}
    return {part.key: part.tensor for part in state.parts}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])] == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    root = tmp_path_factory.mktemp("resharding")
    config = write_run(root, prepared)
    for work in (start, resume):
        for ranks in (1, 2, 4):
            run_ranks(work, ranks, ranks, free_port(), config, seconds=100)
    return root


@pytest.mark.timeout(400)
def test_all_layouts_have_the_same_state(runs: Path) -> None:
    """However it was sharded: FSDP by rows, DeepSpeed's ZeRO by ranges of flattened groups."""
    expected = tensors(checkpoint(runs / "fsdp"))
    for name in (name for name in ON if name != "pruned"):
        found, tolerance = tensors(checkpoint(runs / name)), 4e-2 if "bf16" in name else 1e-5
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            if not key.endswith(("key_embedding", "qkv.bias")):  # no gradient but rounding for keys
                error = (found[key] - tensor).norm() / tensor.norm()
                assert error < tolerance, f"{name}: {key} is off by {error:.1e}"


@pytest.mark.parametrize(("source", "layout"), RESUMED)
def test_a_run_resumes_on_another_layout_as_if_it_had_kept_its_own(runs: Path, source: str, layout: str) -> None:
    run = runs / f"{source}_on_{layout}"
    assert_equal(tensors(checkpoint(run)), tensors(checkpoint(runs / source)))  # saved again before a step
    expected = torch.tensor(numbers(metrics(runs / source), "step", "loss", "grad_norm"), dtype=torch.float64)[CUT:]
    found = torch.tensor(numbers(metrics(run), "step", "loss", "grad_norm"), dtype=torch.float64)
    assert found[:, 0].tolist() == list(range(CUT + 1, END + 1))
    other_bf16 = "bf16" in source
    for column, name in ((1, "loss"), (2, "norm")):
        tolerance = (1e-3, 2e-2)[column - 1] if other_bf16 else 1e-6
        torch.testing.assert_close(found[:, column], expected[:, column], rtol=tolerance, atol=0, msg=named(name))


@pytest.mark.parametrize("layout", ON["pruned"])
def test_a_pruned_run_keeps_the_moments_of_its_heads(runs: Path, layout: str) -> None:
    run, before = runs / f"pruned_on_{layout}", tensors(checkpoint(runs / "one"))
    found = tensors(checkpoint(run))
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        for layer, kept in enumerate(KEPT):
            key = f"{kind}/blocks.{layer}.attention.query_embedding"
            assert torch.equal(found[key], before[key][list(kept)])
        assert torch.equal(found[f"{kind}/final_norm.weight"], before[f"{kind}/final_norm.weight"])
    expected = torch.tensor(numbers(metrics(runs / "pruned_on_one"), "step", "loss", "grad_norm"), dtype=torch.float64)
    steps = torch.tensor(numbers(metrics(run), "step", "loss", "grad_norm"), dtype=torch.float64)
    assert steps[:, 0].tolist() == list(range(CUT + 1, END + 1))
    torch.testing.assert_close(steps, expected, rtol=1e-6, atol=0)


def test_a_sharded_checkpoint_is_used_without_an_engine(runs: Path) -> None:
    folder = checkpoint(runs / "pipeline", END)
    assert weight_files(folder) == ["engine/index.json", *(f"engine/rank_{rank:05d}.safetensors" for rank in range(2))]
    expected, found = load_weights(folder), load_model(runs / "pipeline").model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
