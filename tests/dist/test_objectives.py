"""A second objective and weighted labels on every engine, against plain torch in float64 that adds up all labels at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.loader import Batch
from data_pipeline.read.task_file import Row, Task
from data_pipeline.read.task_loader import TaskLoader
from model.decoder import DecoderLM
from model.initialization import init_weights
from model.layers import Layers
from pretrain.backends.base import Backend
from pretrain.build import make_backend
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.distributed.layout import Layout
from pretrain.loop.evaluate import evaluate
from pretrain.loop.task_scores import log_probabilities
from pretrain.objectives import registry
from pretrain.objectives.base import WeightedSum, weighted_sum
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.registry import ObjectiveEntry
from tests.helpers import free_port, launched_as, run_ranks, write_run

VOCABULARY, LENGTH, SAMPLES, MICRO, Z = 63, 16, 8, 2, 0.1
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"zero 0": ("--parallel.zero_stage=0",), "fsdp": ("--backend=fsdp",)},
    2: {
        "zero 0": ("--parallel.zero_stage=0",),
        "zero 2": ("--parallel.zero_stage=2",),
        "zero 3": ("--parallel.zero_stage=3",),
        "fsdp": ("--backend=fsdp",),
        "pipeline": ("--parallel.pipeline=2",),
        "pipeline by time": ("--parallel.pipeline=2", "--parallel.pipeline_balance=time"),
        "tensor": ("--parallel.tensor=2",),
        "tensor, sequence": ("--parallel.tensor=2", "--parallel.sequence=true"),
        "tensor, fsdp": ("--parallel.tensor=2", "--backend=fsdp"),
    },
    4: {
        "pipeline, data": ("--parallel.pipeline=2",),
        "pipeline, tensor": ("--parallel.pipeline=2", "--parallel.tensor=2"),
        "pipeline, tensor, sequence": ("--parallel.pipeline=2", "--parallel.tensor=2", "--parallel.sequence=true"),
        "fsdp, hybrid": ("--backend=fsdp", "--parallel.replicate=2"),
    },
}
LONG = "--data.sequence_length=128"  # steps have samples of 16 tokens all the same
NO_MULTIPLE = f"--model.vocab_size={VOCABULARY}"  # tensor-parallel ranks pad it
WEIGHTS = (
    "fractions",
    "none",
    "some",
)  # "some": every other micro-batch has them, so with two data-parallel ranks only one has


class WithZLoss(NextToken):
    """The next token, and the squared log-normalizer of its distribution, as in PaLM (arXiv 2204.02311)."""

    def loss(self, own: Tensor, labels_BS: Tensor, weights_BS: Tensor | None, layers: Layers) -> WeightedSum:
        normalizers_SB = layers.sum_parts(own.exp().sum(dim=-1)).log()
        return weighted_sum(layers.losses(own, labels_BS) + Z * normalizers_SB.t().square(), weights_BS)


class LogitsFreed(NextToken):
    """Notes at the beginning of each backward pass whether the logits are gone."""

    def loss(self, own: Tensor, labels_BS: Tensor, weights_BS: Tensor | None, layers: Layers) -> WeightedSum:
        total, logits = super().loss(own, labels_BS, weights_BS, layers), StorageWeakRef(own.untyped_storage())
        total.loss.register_hook(lambda _: FREED.append(logits.expired()))
        return total


FREED: list[bool] = []


def step_of_all(kind: str) -> list[Batch]:
    """The micro-batches of a step; weights differ between samples, so micro-batches and ranks weigh differently."""
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=draw)
    weights = torch.rand(SAMPLES, LENGTH, generator=draw) * (torch.rand(SAMPLES, 1, generator=draw) > 0.4)
    batches = zip(tokens.split(MICRO), (weights / torch.arange(1, SAMPLES + 1)[:, None]).split(MICRO), strict=True)
    weighted = {"fractions": (0, 1), "none": (), "some": (0,)}[kind]
    return [Batch(t[:, :-1], t[:, 1:], w if number % 2 in weighted else None) for number, (t, w) in enumerate(batches)]


def share(batches: Sequence[Batch], layout: Layout) -> list[Batch]:
    """This rank's micro-batches, dealt out as TrainLoader does."""
    return list(batches[layout.coordinate("data") :: layout.size("data")])


@dataclass(frozen=True)
class Reference:
    """Loss and gradient norm of a step, in float64."""

    loss: float
    grad_norm: float


def reference(config: Config, kind: str) -> Reference:
    model = DecoderLM(config.model)
    init_weights(model, config.run.seed)
    model.double()
    batches = step_of_all(kind)
    weights = torch.cat([torch.ones(MICRO, LENGTH) if b.weights is None else b.weights for b in batches]).double()
    logits, labels = model.logits(torch.cat([b.tokens for b in batches])), torch.cat([b.labels for b in batches])
    entropies = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    loss = ((entropies + Z * logits.logsumexp(-1).square()) * weights).sum() / weights.sum()
    assert loss > 1.2 * (entropies * weights).sum() / weights.sum(), "the other objective would pass, too"
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    return Reference(loss.item(), norm.item())


def check(engine: Backend, layout: Layout, expected: dict[str, Reference], name: str) -> None:
    for kind in WEIGHTS:
        batches, wanted = share(step_of_all(kind), layout), expected[kind]
        result = engine.train_step(batches, 0.0)  # the weights stay
        (loss,) = mean_over_ranks([result.loss], layout.device)
        assert loss == pytest.approx(wanted.loss, rel=1e-6), (name, kind)
        assert result.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5), (name, kind)
        evaluation = evaluate(engine.eval_loss, batches, layout.device, layout.size("data"))
        assert evaluation is not None
        assert evaluation.loss == pytest.approx(wanted.loss, rel=1e-6), (name, kind)
        labels = [batch.weights for batch in step_of_all(kind)]
        total = sum(MICRO * LENGTH if weights is None else float(weights.double().sum()) for weights in labels)
        assert evaluation.weight == pytest.approx(total, rel=1e-12), (name, kind)
    nothing = [Batch(batch.tokens, batch.labels, torch.zeros(MICRO, LENGTH)) for batch in batches]
    with pytest.raises(ValueError, match="some must count"):  # on every rank
        engine.train_step(nothing, 0.0)


def check_term(engine: Backend, layout: Layout, expected: dict[str, Reference], entropy: float, name: str) -> None:
    """The z-loss as a term beside the objective, which evaluations leave out: loss and gradient of a step are the same."""
    for kind in WEIGHTS:
        result = engine.train_step(share(step_of_all(kind), layout), 0.0)
        loss, term = mean_over_ranks([result.loss, result.auxiliary["z_loss"]], layout.device)
        assert loss == pytest.approx(expected[kind].loss, rel=1e-6), (name, kind)
        assert result.grad_norm == pytest.approx(expected[kind].grad_norm, rel=1e-5), (name, kind)
        if kind == "none":
            assert loss - term == pytest.approx(entropy, rel=1e-6), name
    batches = share(step_of_all("none"), layout)
    evaluation = evaluate(engine.eval_loss, batches, layout.device, layout.size("data"))
    assert evaluation is not None
    assert evaluation.loss == pytest.approx(entropy, rel=1e-6), name


def task() -> Task:
    """Rows of all lengths that a batch can have; with two data-parallel ranks the last batch of one has no row."""
    draw, lengths = torch.Generator().manual_seed(6), (*range(3, 129, 9), 129, 65)
    rows = [torch.randint(VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    return Task("docs", [], [Row(row, 1 + number % 2) for number, row in enumerate(rows)], 0)


def expected_logs(config: Config) -> list[float]:
    """The log-probability of each row's last tokens, in float64, one row at a time."""
    model, found = DecoderLM(config.model), []
    init_weights(model, config.run.seed)
    model.double()
    for row in task().rows:
        tokens = torch.tensor([row.tokens])
        logs = model.logits(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])
        found.append(logs[0, -row.scored :].sum().item())
    return found


def check_task(engine: Backend, layout: Layout, length: int, expected: list[float], name: str) -> None:
    """Between two steps, whose shape is another."""
    loader = TaskLoader(task(), length, MICRO, layout.coordinate("data"), layout.size("data"))
    logs = log_probabilities(engine.eval_loss, loader, layout.device, layout.size("data"))
    assert logs == pytest.approx(expected, rel=1e-5), name


def train_once(rank: int, ranks: int, config: Path, port: int, expected: dict[str, Reference], of_rows: list[float]) -> None:
    with launched_as(rank, ranks, port) as opened:
        for name, overrides in LAYOUTS[ranks].items():
            run = load_config(config, (*overrides, NO_MULTIPLE, LONG), world_size=ranks).resolved(VOCABULARY)
            with opened(run.parallel) as layout:
                registry._OBJECTIVES["next_token"] = ObjectiveEntry(f"{__name__}:WithZLoss", causal=True)
                engine = make_backend(run, layout)
                check(engine, layout, expected, name)
                engine.objective = NextToken(run)  # type: ignore[attr-defined]
                check_task(engine, layout, 128, of_rows, name)
                result = engine.train_step(share(step_of_all("none"), layout), 0.0)
                (loss,) = mean_over_ranks([result.loss], layout.device)
                assert loss < expected["none"].loss - 0.1, "the other objective"
                with_term = load_config(config, (*overrides, NO_MULTIPLE, LONG, f"--training.z_loss={Z}"), world_size=ranks)
                engine.objective = NextToken(with_term.resolved(VOCABULARY))  # type: ignore[attr-defined]
                check_term(engine, layout, expected, loss, name)
                check_task(engine, layout, 128, of_rows, name)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.thorough)])
def test_another_objective_and_weighted_labels_on_every_engine(tmp_path: Path, prepared: Path, ranks: int) -> None:
    config = write_run(tmp_path, prepared)
    run = load_config(config, (NO_MULTIPLE, LONG), world_size=1).resolved(VOCABULARY)
    expected = {kind: reference(run, kind) for kind in WEIGHTS}
    run_ranks(train_once, ranks, ranks, config, free_port(), expected, expected_logs(run))


def watch_logits(rank: int, config: Path, port: int) -> None:
    registry._OBJECTIVES["next_token"] = ObjectiveEntry(f"{__name__}:LogitsFreed", causal=True)
    with launched_as(rank, 2, port) as opened:
        for name in ("zero 0", "zero 2", "zero 3", "fsdp"):
            run = load_config(config, LAYOUTS[2][name], world_size=2).resolved(VOCABULARY)
            with opened(run.parallel) as layout:
                make_backend(run, layout).train_step(share(step_of_all("none"), layout), 1e-3)
                assert FREED == [True, True], name
                FREED.clear()


def test_no_engine_keeps_the_logits_for_the_backward_pass(tmp_path: Path, prepared: Path) -> None:
    run_ranks(watch_logits, 2, write_run(tmp_path, prepared), free_port())
