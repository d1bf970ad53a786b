"""Weighted labels on every engine: the loss and gradient norm of one process that adds up all labels at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.load import load_config
from data_pipeline.read.loader import Batch
from model.decoder import DecoderLM
from model.initialization import init_weights
from pretrain.build import make_backend
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.distributed.layout import Layout
from tests.helpers import free_port, launched_as, run_ranks, write_run

VOCABULARY, LENGTH, SAMPLES, MICRO = 64, 16, 8, 2
LAYOUTS = {
    "zero 0": ("--parallel.zero_stage=0",),
    "zero 2": ("--parallel.zero_stage=2",),
    "pipeline": ("--parallel.pipeline=2",),
    "tensor": ("--parallel.tensor=2", "--parallel.sequence=true"),
    "fsdp": ("--backend=fsdp",),
}


def step_of_all() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and label weights of a step; weights differ between samples, so micro-batches and ranks weigh differently."""
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=draw)
    weights = torch.rand(SAMPLES, LENGTH, generator=draw) * (torch.rand(SAMPLES, 1, generator=draw) > 0.4)
    return tokens, weights * torch.arange(1, SAMPLES + 1)[:, None]


def share(layout: Layout) -> list[Batch]:
    """This rank's micro-batches, dealt out as TrainLoader does."""
    tokens, weights = (part.split(MICRO) for part in step_of_all())
    mine = range(layout.coordinate("data"), len(tokens), layout.size("data"))
    return [Batch(tokens[m][:, :-1], tokens[m][:, 1:], weights[m]) for m in mine]


def train_once(rank: int, config: Path, port: int, expected: tuple[float, float]) -> None:
    with launched_as(rank, 2, port) as opened:
        for name, overrides in LAYOUTS.items():
            run = load_config(config, overrides, world_size=2).resolved(VOCABULARY)
            with opened(run.parallel) as layout:
                result = make_backend(run, layout).train_step(share(layout), 1e-3)
                (loss,) = mean_over_ranks([result.loss], layout.device)
                assert loss == pytest.approx(expected[0], rel=1e-6), name
                assert result.grad_norm == pytest.approx(expected[1], rel=1e-5), name


def test_weighted_labels_count_alike_on_every_engine(tmp_path: Path, prepared: Path) -> None:
    config = write_run(tmp_path, prepared)
    run = load_config(config, world_size=1).resolved(VOCABULARY)
    model = DecoderLM(run.model)
    init_weights(model, run.run.seed)
    tokens, weights = step_of_all()
    loss = (model(tokens[:, :-1], tokens[:, 1:]) * weights).sum() / weights.sum()
    loss.backward()
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    run_ranks(train_once, 2, config, free_port(), (loss.item(), norm.item()))
