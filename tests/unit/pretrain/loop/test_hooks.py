"""When validation and checkpoints happen, with steps that end in every way."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from pretrain.loop.hooks import Checkpoints, Validation
from pretrain.objectives.base import WeightedSum
from tests.helpers import metrics, numbers
from tests.unit.pretrain.loop.engine import ONE_STEP, Held, Loop

STEPS = "--training.steps=5"
BYTES = 0.5  # of text, for each nat of an unweighted loss


def validation(every_steps: int, held: Held) -> Validation:
    loader: Any = held
    return Validation(loader, every_steps, lambda batch: float(batch.labels.sum()) * BYTES)


def validated(folder: Path) -> list[float]:
    """The steps that have a validation loss."""
    return [step for step, _ in numbers(metrics(folder / "run"), "step", "validation/loss")]


@pytest.mark.parametrize(("every_steps", "expected"), [(2, [2, 4, 5]), (5, [5]), (0, [5]), (1, [1, 2, 3, 4, 5]), (7, [5])])
def test_validation_every_n_steps_and_after_the_last(tmp_path: Path, every_steps: int, expected: list[int]) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[validation(every_steps, Held([[1]]))])
    loop.trainer.run()
    assert validated(tmp_path) == expected
    assert loop.events.count("evaluate") == len(expected)


def test_validation_reports_the_weighted_mean_and_its_exponential(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Held([[1, 3], [5, 9]], weights=[[1.0, 0.5], [0.5, 0.0]])
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, held)]).trainer.run()
    line = metrics(tmp_path / "run")[-1]
    bits = 5 / math.log(2) / 9  # 5 nats; labels that sum up to 18
    assert line == {
        "step": 1,
        "validation/loss": 2.5,
        "validation/perplexity": pytest.approx(math.exp(2.5)),
        "validation/bits_per_byte": pytest.approx(bits),
    }
    expected = f"step 1: validation loss 2.5000, perplexity 12.18, {bits:.4f} bits per byte"
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_text_of_no_bytes_has_no_bits_per_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, Held([[0, 0]]))]).trainer.run()
    assert set(metrics(tmp_path / "run")[-1]) == {"step", "validation/loss", "validation/perplexity"}
    assert capsys.readouterr().out.splitlines()[-1] == "step 1: validation loss 0.0000, perplexity 1.00"


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_its_checkpoint(tmp_path: Path, lost: float) -> None:
    loop = Loop(tmp_path, *ONE_STEP, hooks=[validation(0, Held([[1]])), Checkpoints(1)])
    loop.engine.eval_loss = lambda batch: WeightedSum(torch.tensor(lost), 1.0)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=f"^step 1: validation loss {lost}: training diverged; start anew in another"):
        loop.trainer.run()
    assert [event for event in loop.events if isinstance(event, int)] == []
    assert "validation/loss" not in metrics(tmp_path / "run")[-1]


def test_a_loss_beyond_all_numbers_has_a_finite_perplexity(tmp_path: Path) -> None:
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, Held([[1000]]))]).trainer.run()
    assert metrics(tmp_path / "run")[-1]["validation/perplexity"] == math.exp(700)


def test_no_validation_after_a_signal(tmp_path: Path) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[validation(1, Held([[1]]))])
    loop.stop_by(signal.SIGTERM, at=3)  # 1: a step, 2: its validation, 3: a step
    assert loop.trainer.run() == signal.SIGTERM
    assert validated(tmp_path) == [1]
    assert (loop.trained, loop.events.count("evaluate")) == (2, 1)  # not even a batch


def test_no_validation_after_a_signal_in_the_last_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path, *ONE_STEP, hooks=[validation(1, Held([[1]]))])
    loop.stop_by(signal.SIGTERM, at=1)
    assert loop.trainer.run() is None
    assert loop.events.count("evaluate") == 0


def test_a_signal_ends_a_validation_after_the_running_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[validation(1, Held([[1]] * 9))])
    loop.stop_by(signal.SIGINT, at=3)  # in the second batch
    assert loop.trainer.run() == signal.SIGINT
    assert (loop.trained, loop.events.count("evaluate")) == (1, 2)
    assert validated(tmp_path) == []
    assert "validation" not in capsys.readouterr().out


@pytest.mark.parametrize(("every_steps", "expected"), [(2, [2, 4, 5]), (5, [5]), (0, [5]), (1, [1, 2, 3, 4, 5])])
def test_a_checkpoint_every_n_steps_and_one_at_the_end(tmp_path: Path, every_steps: int, expected: list[int]) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[Checkpoints(every_steps)])
    loop.trainer.run()
    assert [event for event in loop.events if isinstance(event, int)] == expected


@pytest.mark.parametrize(("stopped_in", "expected"), [(1, [1]), (2, [2]), (3, [2, 3]), (4, [2, 4])])
def test_an_interruption_saves_its_step_once(tmp_path: Path, stopped_in: int, expected: list[int]) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[Checkpoints(2)])
    loop.stop_by(signal.SIGTERM, at=stopped_in)
    loop.trainer.run()
    assert [event for event in loop.events if isinstance(event, int)] == expected


@pytest.mark.parametrize("first_step", [0, 3])
def test_nothing_is_saved_without_a_step(tmp_path: Path, first_step: int) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[Checkpoints(1)], first_step=first_step)
    loop.trainer.interruption.signal = signal.SIGTERM
    assert loop.trainer.run() == signal.SIGTERM
    assert loop.events == []


def test_a_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop(tmp_path, *ONE_STEP, hooks=[Checkpoints(0)]).trainer.run()
    assert capsys.readouterr().out.splitlines()[-1] == "step 1: checkpoint step 1"
