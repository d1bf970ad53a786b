"""Which rank is the slowest, from known seconds; and on ranks that are slow on purpose."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.build import build_trainer
from pretrain.loop.slowest import COMPUTES, LOADS, REPORTS, SlowestRank, slowest
from pretrain.loop.trainer import Trainer
from tests.helpers import joined, metrics, resolved, run_ranks, write_run

ASLEEP = 0.2  # seconds of a slow rank in each step; far more than what a busy machine adds


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ([[0.1, 1.0, 0.0], [0.4, 1.1, 0.0]], (1, 0.4, LOADS)),
        ([[0.1, 1.0, 0.0], [0.1, 1.2, 0.0], [0.0, 4.0, 0.1]], (2, 2.9, COMPUTES)),
        ([[0.1, 1.0, 0.5], [0.1, 1.2, 0.0], [0.2, 1.1, 0.0]], (0, 0.3, REPORTS)),
        ([[0.1, 1.0, 0.0], [0.1, 1.0, 0.0]], (0, 0.0, LOADS)),
    ],
)
def test_the_lag_is_to_the_median_of_the_others(seconds: list[list[float]], wanted: tuple[int, float, str]) -> None:
    found = slowest(seconds)
    assert (found.rank, found.lag, found.work) == (wanted[0], pytest.approx(wanted[1]), wanted[2])


def slow_loader(trainer: Trainer) -> None:
    loader: Any = trainer.loader
    step = loader.step

    def slow(number: int) -> Any:
        time.sleep(ASLEEP)
        return step(number)

    loader.step = slow


def slow_model(trainer: Trainer) -> None:
    """In each of two micro-batches."""
    module: Any = trainer.backend.module.get_submodule("blocks.1.mlp.up")
    module.register_forward_pre_hook(lambda *_: time.sleep(ASLEEP / 2))


RUNS = [  # engine, which rank is slow, how, and what it is to be blamed for
    ("fsdp", 1, slow_loader, LOADS),
    ("fsdp", 0, slow_model, COMPUTES),
    ("deepspeed", 1, slow_model, COMPUTES),
]


def _run(rank: int, ranks: int, folder: Path, data: Path) -> None:
    for number, (engine, slow_rank, slow, _) in enumerate(RUNS):
        (place := folder / str(number)).mkdir(exist_ok=True)
        overrides = [f"--backend={engine}", "--validation.every_steps=0", "--training.steps=4"]
        config = resolved(write_run(place, data), overrides, world_size=ranks)
        with joined(rank, ranks, place) as layout:
            trainer = build_trainer(config, layout)
            if rank == slow_rank:
                slow(trainer)
            for _ in range(3):
                trainer.advance()
            trainer.hook(SlowestRank).at_end(trainer)
            trainer.close()


def test_a_rank_that_is_slow_on_purpose_is_named(tmp_path: Path, prepared: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(_run, 2, 2, tmp_path, prepared)
    shown = capfd.readouterr().out
    said = [line for line in shown.splitlines() if "holds up" in line]
    assert len(said) == len(RUNS), shown
    for number, (_, rank, _, work) in enumerate(RUNS):
        lines = [line for line in metrics(tmp_path / str(number) / "run") if "slowest_rank" in line]
        assert [(line["step"], line["slowest_rank"]) for line in lines] == [(2, rank), (3, rank)], number
        for line in lines:
            assert 0.7 * ASLEEP < line["slowest_lag_seconds"] < 2 * ASLEEP, number
        assert re.fullmatch(
            rf"step 3: rank {rank} holds up the others: it works 0\.\d+ s longer, \d+% of the step, above all in {work}",
            said[number],
        )
