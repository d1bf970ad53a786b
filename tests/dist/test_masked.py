"""Corrupted text on two ranks, of which one has hardly a token to predict, against one process in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.load import load_config
from configs.schema import Config
from data_pipeline.corrupt.draws import sample_seed
from data_pipeline.read.loader import Batch
from model import registry
from model.build import build_model
from model.initialization import init_weights
from pretrain.build import make_backend
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.loop.evaluate import evaluate
from pretrain.objectives.registry import make_objective
from tests.bidirectional import BIDIRECTIONAL, KIND
from tests.helpers import free_port, launched_as, run_ranks, write_run

VOCABULARY, LENGTH, SAMPLES, MICRO = 321, 16, 8, 2
LAYOUTS = {
    "zero 1": ("--parallel.zero_stage=1",),
    "fsdp": ("--backend=fsdp",),
    "pipeline": ("--parallel.pipeline=2",),
    "tensor, sequence": ("--parallel.tensor=2", "--parallel.sequence=true"),
}
OBJECTIVES = {
    "masked": ("--training.objective=masked", f"--model.kind={BIDIRECTIONAL}", "--training.masked.share=0.4"),
    "documents": (
        "--training.objective=masked",
        f"--model.kind={BIDIRECTIONAL}",
        "--training.masked.whole_words=true",
        "--data.packing=documents",
    ),
    "spans": ("--training.objective=spans", "--model.position=rope"),
}


def step_of_all() -> list[Batch]:
    """The micro-batches of a step. Of every other one, which is one rank's, all but two tokens are ends of documents."""
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 290, (SAMPLES, LENGTH + 1), generator=draw)
    seeds = torch.tensor([sample_seed("test", number) for number in range(SAMPLES)])
    parts = zip(tokens.split(MICRO), seeds.split(MICRO), strict=True)
    batches = [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), None, s) for t, s in parts]
    for batch in batches[::2]:
        batch.tokens[:, 1:] = 0
    return batches


def load(path: Path, *overrides: str) -> Config:
    return load_config(path, overrides, world_size=2).resolved(VOCABULARY, 0)


def reference(config: Config) -> tuple[float, float, float]:
    """Loss, gradient norm and weight of the step, all labels at once."""
    model, objective = build_model(config.model), make_objective(config)
    init_weights(model, config.run.seed)
    model.double()
    examples = [objective.examples(batch) for batch in step_of_all()]
    inputs, labels = torch.cat([part.inputs for part in examples]), torch.cat([part.labels for part in examples])
    weights = torch.cat([part.weights for part in examples if part.weights is not None]).double()
    losses = F.cross_entropy(model(inputs).permute(1, 2, 0), labels, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    return loss.item(), norm.item(), float(weights.sum())


ELSEWHERE = {  # pairs whose parts other pairs have
    ("zero 1", "documents"),
    ("zero 1", "spans"),
    ("fsdp", "documents"),
    ("tensor, sequence", "masked"),
    ("tensor, sequence", "spans"),
}


def check_steps(rank: int, path: Path, port: int, expected: dict[str, tuple[float, float, float]]) -> None:
    registry._KINDS[BIDIRECTIONAL] = KIND
    with launched_as(rank, 2, port) as opened:
        for layout_name, layout_options in LAYOUTS.items():
            for name, options in OBJECTIVES.items():
                if (layout_name, name) in ELSEWHERE:
                    continue
                config, (loss, norm, weight) = load(path, *layout_options, *options), expected[name]
                with opened(config.parallel) as layout:
                    engine = make_backend(config, layout)
                    own = step_of_all()[layout.coordinate("data") :: layout.size("data")]
                    result = engine.train_step(own, 0.0)
                    (found,) = mean_over_ranks([result.loss], layout.device)
                    assert found == pytest.approx(loss, rel=1e-6), (layout_name, name)
                    assert result.grad_norm == pytest.approx(norm, rel=1e-5), (layout_name, name)
                    evaluation = evaluate(engine.eval_loss, own, layout.device, layout.size("data"))
                    assert evaluation is not None
                    assert (evaluation.loss, evaluation.weight) == pytest.approx((loss, weight), rel=1e-6), (layout_name, name)


def test_every_engine_weighs_ranks_by_their_corrupted_tokens(
    tmp_path: Path, masked_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._KINDS, BIDIRECTIONAL, KIND)
    path, expected = write_run(tmp_path, masked_data), {}
    for name, options in OBJECTIVES.items():
        config = load(path, *options)
        expected[name] = reference(config)
        if name == "masked":
            weights = [make_objective(config).examples(batch).weight for batch in step_of_all()]
            assert max(weights[::2]) < min(weights[1::2]) / 5
    run_ranks(check_steps, 2, path, free_port(), expected)
