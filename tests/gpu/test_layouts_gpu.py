"""Engines on GPUs: equal to one process of plain torch on the CPU, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.parity import LAYOUTS, measure
from tests.dist.test_resume import STEP, train_here
from tests.helpers import free_port, launched_as, metrics, numbers, run_ranks, write_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    "name", ["ZeRO 1 × 2, bf16", "ZeRO 2 × 2", "ZeRO 3 × 2, bf16", "PP 2, bf16", "FSDP 2, bf16", "TP 2 × PP 2, SP"]
)
def test_a_layout_equals_one_process(prepared: Path, name: str) -> None:
    if torch.cuda.device_count() < LAYOUTS[name].ranks:
        pytest.skip(f"needs {LAYOUTS[name].ranks} GPUs")
    for row in measure([name], ["mha", "mhe_add"], prepared, steps=6):
        assert row.loss < 1e-3, row
        assert row.grad_norm < 2e-2, row


ENGINES = {
    "zero1": ["--parallel.zero_stage=1"],
    "zero3": ["--parallel.zero_stage=3"],
    "offload": ["--parallel.zero_stage=2", "--parallel.cpu_offload=true"],
    "fsdp": ["--backend=fsdp"],
}


def straight_and_in_parts(rank: int, port: int, config: Path, settings: list[str]) -> None:
    with launched_as(rank, 1, port) as opened:
        overrides = [*settings, "--training.precision=bf16", "--model.dropout=0.1", "--training.steps=8"]
        train_here(opened, config, [*overrides, f"--run.folder={config.parent}/whole"], "none")
        for resume, stop_at in (("none", 4), ("auto", None)):
            train_here(opened, config, [*overrides, f"--run.folder={config.parent}/parts"], resume, stop_at)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, prepared: Path, engine: str) -> None:
    config = write_run(tmp_path, prepared)
    run_ranks(straight_and_in_parts, 1, free_port(), config, ENGINES[engine], gpus=True)
    assert numbers(metrics(tmp_path / "parts"), *STEP) == numbers(metrics(tmp_path / "whole"), *STEP)
