"""Optimizers beside AdamW enter by an entry and a recipe alone: they train as torch's own do on one process, and resume.

One keeps a single state and no number of steps, one has two groups with different states, one needs unsharded matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from configs.schema import Config, OptimizerConfig
from data_pipeline.read.dataset import TokenDataset
from model.decoder import DecoderLM
from model.initialization import init_weights
from pretrain.checkpoints.unsharded import load_state
from pretrain.optim import registry
from pretrain.optim.groups import ParameterGroup
from pretrain.optim.registry import Kept, OptimizerKind
from pretrain.optim.schedule import learning_rate
from tests.helpers import free_port, launched_as, losses_of, metrics, named, numbers, resolved, run_ranks, train_here, write_run

if TYPE_CHECKING:
    from tests.helpers import Opener

CUT, END = 2, 4  # the step of the checkpoint, and the last one
SETTINGS = (f"--training.steps={END}", "--validation.every_steps=0", f"--checkpoint.every_steps={CUT}", "--optimizer.lr=0.02")
LAYOUTS = {
    "zero0": ["--parallel.zero_stage=0"],
    "zero1": ["--parallel.zero_stage=1"],
    "zero1_bf16": ["--parallel.zero_stage=1", "--training.precision=bf16"],
    "zero2": ["--parallel.zero_stage=2"],
    "zero3": ["--parallel.zero_stage=3"],
    "pipeline": ["--parallel.zero_stage=0", "--parallel.pipeline=2"],
    "fsdp": ["--backend=fsdp"],
}
# Optimizer → where a run comes from → on which layouts it resumes. In bf16 before ZeRO 3, after which a process computes with
# other kernels.
ON: dict[str, dict[str, list[str]]] = {
    "momentum": {"zero1": ["zero1", "fsdp"], "zero2": ["zero2", "zero0"], "fsdp": ["fsdp", "zero2"]},
    "mixed": {
        "zero1": ["zero1", "pipeline"],
        "zero1_bf16": ["zero1_bf16"],
        "zero2": ["zero2", "fsdp"],
        "zero3": ["zero3", "zero1"],
        "pipeline": ["pipeline", "zero3"],
        "fsdp": ["fsdp", "zero2"],
    },
    "muon": {"zero0": ["zero0"], "pipeline": ["pipeline"]},
}
SOURCES = [(optimizer, source) for optimizer, sources in ON.items() for source in sources]
RESUMED = [(optimizer, source, layout) for optimizer, source in SOURCES for layout in ON[optimizer][source]]
MOMENTUM, MOMENTS = Kept(("momentum_buffer",)), Kept(("exp_avg", "exp_avg_sq"), {"step": 0.0})
NO_GRADIENT = ("key_embedding", "qkv.bias")  # but rounding, for keys


class Momentum:
    """Stochastic gradient descent with momentum for all parameters."""

    def groups(self, dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
        return [ParameterGroup("all", tuple(dimensions), {})]

    def build(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        return sgd(groups, config)


class Mixed:
    """Momentum for the matrices of blocks, AdamW for all others."""

    matrices: Callable[[Any, OptimizerConfig], torch.optim.Optimizer] = staticmethod(lambda groups, config: sgd(groups, config))

    def groups(self, dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
        chosen = {kind: [name for name, count in dimensions.items() if kind_of(name, count) == kind] for kind in KINDS}
        return [ParameterGroup(kind, tuple(names), {"of": kind}) for kind, names in chosen.items()]

    def build(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        return Several(groups, {"matrices": self.matrices, "others": adamw}, config)


class Muon(Mixed):
    """torch's Muon for the matrices of blocks, AdamW for all others."""

    matrices = staticmethod(lambda groups, config: torch.optim.Muon(groups, lr=config.lr))


class Several(torch.optim.Optimizer):
    """An optimizer for each parameter group, over the same groups and the same state."""

    def __init__(self, groups: list[dict[str, Any]], makers: Mapping[str, Callable[..., Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.optimizers = [makers[group["of"]]([group], config) for group in self.param_groups]
        for optimizer in self.optimizers:
            optimizer.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


KINDS = {"matrices": MOMENTUM, "others": MOMENTS}
ENTRIES = {
    "momentum": OptimizerKind(f"{__name__}:Momentum", {"all": MOMENTUM}),
    "mixed": OptimizerKind(f"{__name__}:Mixed", KINDS),
    "muon": OptimizerKind(f"{__name__}:Muon", KINDS, unsharded_matrices=True),
}


def kind_of(name: str, dimensions: int) -> str:
    return "matrices" if name.startswith("blocks.") and dimensions == 2 else "others"


def sgd(parameters: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.beta1)


def adamw(parameters: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.1)


def torchs_own(model: DecoderLM, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """torch's optimizers of a model on one process."""
    if config.kind == "momentum":
        return [sgd(model.parameters(), config)]
    chosen = {kind: [p for name, p in model.named_parameters() if kind_of(name, p.dim()) == kind] for kind in KINDS}
    matrices = sgd if config.kind == "mixed" else Muon.matrices
    return [matrices(chosen["matrices"], config), adamw(chosen["others"], config)]


def loaded(config_path: Path, optimizer: str, *overrides: str) -> Config:
    return resolved(config_path, [*SETTINGS, f"--optimizer.kind={optimizer}", *overrides], world_size=2)


def train(opened: Opener, config_path: Path, optimizer: str, layout: str, run: str, resume: Path | None = None) -> None:
    folder = config_path.parent / optimizer / run
    train_here(opened, loaded(config_path, optimizer, *LAYOUTS[layout], f"--run.folder={folder}"), resume)


def train_all(rank: int, port: int, config: Path) -> None:
    registry._KINDS.update(ENTRIES)
    with launched_as(rank, 2, port) as opened:
        for optimizer, source in SOURCES:
            train(opened, config, optimizer, source, source)
            for layout in ON[optimizer][source]:
                before = checkpoint(config.parent / optimizer / source)
                train(opened, config, optimizer, layout, f"{source}_on_{layout}", before)


def checkpoint(run: Path, step: int = CUT) -> Path:
    return run / f"checkpoints/step_{step:08d}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterable[Path]:
    root = tmp_path_factory.mktemp("optimizers")
    run_ranks(train_all, 2, free_port(), write_run(root, prepared), seconds=200)
    with pytest.MonkeyPatch.context() as patch:
        for name, entry in ENTRIES.items():
            patch.setitem(registry._KINDS, name, entry)
        yield root


@functools.cache
def reference(config_path: Path, optimizer: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient norm of each step, and the last weights, by plain torch on one process."""
    config = loaded(config_path, optimizer)
    model = DecoderLM(config.model)
    init_weights(model, config.run.seed)
    data = TokenDataset(config.data.parts[0].path, "train", config.data.sequence_length, config.run.seed)
    optimizers, figures = torchs_own(model, config.optimizer), []
    for step in range(END):
        data.prepare_range(step * 8, step * 8 + 8)
        tokens = torch.stack([torch.from_numpy(data.sample(number)) for number in range(step * 8, step * 8 + 8)])
        loss = losses_of(model, tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        for one in optimizers:
            one.param_groups[0]["lr"] = learning_rate(step, config)
            one.step()
            one.zero_grad()
        figures.append((loss.item(), norm.item()))
    return torch.tensor(figures, dtype=torch.float64), {name: p.detach() for name, p in model.named_parameters()}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint has of model and optimizer, unsharded, by kind and name."""
    return {part.key: part.tensor for part in load_state(folder).parts}


def figures(run: Path) -> Tensor:
    return torch.tensor(numbers(metrics(run), "loss", "grad_norm"), dtype=torch.float64)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("optimizer", "source"), SOURCES)
def test_a_run_is_that_of_torchs_own_optimizer(runs: Path, optimizer: str, source: str) -> None:
    expected, weights = reference(runs / "run.yaml", optimizer)
    rough = "bf16" in source or optimizer == "muon"  # which multiplies matrices in bf16
    torch.testing.assert_close(figures(runs / optimizer / source), expected, rtol=2e-2 if rough else 2e-5, atol=0)
    found = tensors(checkpoint(runs / optimizer / source, END))
    for name, weight in weights.items():
        if not rough and not name.endswith(NO_GRADIENT):
            torch.testing.assert_close(found[f"model/{name}"], weight, rtol=1e-4, atol=2e-6, msg=named(name))
    assert expected[-1, 0] < expected[0, 0]


@pytest.mark.parametrize(("optimizer", "source"), SOURCES)
def test_a_checkpoint_holds_what_the_entry_declares(runs: Path, optimizer: str, source: str) -> None:
    state = load_state(checkpoint(runs / optimizer / source))
    _, weights = reference(runs / "run.yaml", optimizer)
    declared, scalars = {f"model/{name}" for name in weights}, {}
    for name, weight in weights.items():
        kept = MOMENTUM if optimizer == "momentum" else KINDS[kind_of(name, weight.dim())]
        declared |= {f"{kind}/{name}" for kind in kept.states}
        scalars.update({scalar: [CUT] for scalar in kept.scalars})
    assert {part.key for part in state.parts} == declared
    assert {name: [float(value) for value in values] for name, values in state.scalars.items()} == scalars
    assert all(bool(part.tensor.any()) for part in state.parts if not part.name.endswith(NO_GRADIENT))


@pytest.mark.parametrize(("optimizer", "source", "layout"), RESUMED)
def test_a_run_resumes_on_its_own_layout_to_the_bit_and_on_another(
    runs: Path, optimizer: str, source: str, layout: str
) -> None:
    before, after = runs / optimizer / source, runs / optimizer / f"{source}_on_{layout}"
    saved_again, saved = tensors(checkpoint(after)), tensors(checkpoint(before))
    assert saved_again.keys() == saved.keys()
    assert [key for key, tensor in saved.items() if not torch.equal(saved_again[key], tensor)] == []
    found, expected = figures(after), figures(before)[CUT:]
    if layout != source:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        return
    assert torch.equal(found, expected)
    last_found, last = tensors(checkpoint(after, END)), tensors(checkpoint(before, END))
    assert [key for key, tensor in last.items() if not torch.equal(last_found[key], tensor)] == []
