"""The loop between neighbours with known numbers: what it calls in which order, where it ends, what it reports."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from data_pipeline.read.loader import NoBatchError
from model.costs.flops import executed_flops_per_token
from pretrain.backends.base import StepResult
from pretrain.loop import trainer as module
from pretrain.loop.hooks import Checkpoints
from pretrain.loop.interruption import Interruption
from pretrain.loop.trainer import Trainer
from tests.helpers import joined, metrics, run_ranks
from tests.unit.pretrain.loop.engine import ONE_STEP, Loop, Noted, Saves, Steps


def test_a_step_is_trained_reported_and_shown_to_the_hooks_in_their_order(tmp_path: Path) -> None:
    events: list[Any] = []
    hooks = [
        Noted("first", events, lambda trainer: events.append(metrics(tmp_path / "run")[-1]["step"])),
        Noted("second", events),
    ]
    loop = Loop(tmp_path, "--training.steps=3", hooks=hooks, events=events)
    assert loop.trainer.run() is None
    rates = [pytest.approx(rate) for rate in (0.005, 0.01, 0.001)]
    trained = [("train", f"batches of {step}", rate) for step, rate in enumerate(rates)]
    expected: list[Any] = []
    for step, call in enumerate(trained, start=1):
        expected += [call, ("first", step), step, ("second", step)]  # what a hook sees of step n is written already
    assert events == [*expected, ("first", "end", 3), ("second", "end", 3)]


FIRST_ENDS = "--training.skip.nonfinite=0"


class First(Noted):
    priority = 0


class Last(Noted):
    priority = 90


def test_hooks_act_in_the_order_of_their_priorities(tmp_path: Path) -> None:
    events: list[Any] = []
    hooks = [last := Last("last", events), Noted("a", events), Noted("b", events), First("first", events)]
    loop = Loop(tmp_path, *ONE_STEP, hooks=hooks)
    loop.trainer.run()
    order = ["first", "a", "b", "last"]
    assert events == [(name, 1) for name in order] + [(name, "end", 1) for name in order]
    assert loop.trainer.hook(Last) is last


class Enough(Noted):
    def begin(self, trainer: Trainer) -> None:
        trainer.done = True


def test_a_hook_can_end_a_run_before_its_first_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path, first_step=4, hooks=[noted := Enough("hook", [])])
    assert loop.trainer.run() is None
    assert (loop.trained, noted.events) == (0, [("hook", "end", 4)])


class Short(Steps):
    """Has text for two steps."""

    def step(self, step: int) -> Any:
        if step == 2:
            raise NoBatchError("the text is gone")
        return super().step(step)


def test_where_text_is_missing_a_run_ends_as_one_that_is_complete_and_with_an_error(tmp_path: Path) -> None:
    loop = Loop(tmp_path, hooks=[noted := Noted("hook", [])])
    loader: Any = Short()
    loop.trainer.loader = loader
    with pytest.raises(NoBatchError, match=r"^the text is gone$"):
        loop.trainer.run()
    assert noted.events == [("hook", 1), ("hook", 2), ("hook", "end", 2)]
    saves = Saves([])
    saves.faults["finish"] = UserError("the disk is full")
    saver: Any = saves
    (tmp_path / "full").mkdir()
    loop = Loop(tmp_path / "full", hooks=[Checkpoints(saver, 0)])
    loop.trainer.loader = loader
    with pytest.raises(UserError, match=r"^the text is gone; the disk is full$"):
        loop.trainer.run()
    assert saves.events == [("waits", 2)]


def test_a_resumed_run_takes_the_steps_that_are_left(tmp_path: Path) -> None:
    loop = Loop(tmp_path, first_step=4, hooks=[noted := Noted("hook", [])])
    assert loop.trainer.run() is None
    assert [event[1] for event in loop.events] == ["batches of 4", "batches of 5"]
    assert noted.events == [("hook", 5), ("hook", 6), ("hook", "end", 6)]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [5, 6]


def test_a_finished_run_takes_none(tmp_path: Path) -> None:
    loop = Loop(tmp_path, first_step=6, hooks=[noted := Noted("hook", [])])
    assert loop.trainer.run() is None
    assert (loop.events, noted.events) == ([], [("hook", "end", 6)])


def test_figures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 128 tokens that takes two seconds; the terms are parts of the loss."""
    clock = iter([100.0, 102.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    results = [StepResult(3.0, 0.5, {"gha": 0.75, "other": 0.25})]
    loop = Loop(tmp_path, *ONE_STEP, "--logging.peak_tflops=1", results=results)
    loop.trainer.run()
    (line,) = metrics(tmp_path / "run")
    mfu, hfu, memory, at = (line.pop(name) for name in ("mfu", "hfu", "memory_gib", "time"))
    assert abs(at - time.time()) < 60
    assert line == {
        "step": 1,
        "loss": 2.0,
        "loss/gha": 0.75,
        "loss/other": 0.25,
        "learning_rate": pytest.approx(0.01),
        "grad_norm": 0.5,
        "tokens": 128,
        "seconds": 2.0,
        "tokens_per_second": 64.0,
    }
    assert mfu == pytest.approx(64 * loop.trainer.throughput.flops_per_token / 1e12)
    assert hfu == pytest.approx(64 * executed_flops_per_token(loop.config.model, 16, shares_scores=False) / 1e12)
    assert 0 < memory < 1000


def test_progress_shows_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop(tmp_path, *ONE_STEP, results=[StepResult(3.0, 0.5, {"gha": 0.75})]).trainer.run()
    assert capsys.readouterr().out.startswith("step 1/1 | loss 2.2500 | gha 0.7500 | lr 1.00e-02 | grad 0.50 | ")


def test_a_hook_ends_the_loop(tmp_path: Path) -> None:
    def end(trainer: Trainer) -> None:
        trainer.done = trainer.step == 2

    loop = Loop(tmp_path, hooks=[noted := Noted("hook", [], end)])
    assert loop.trainer.run() is None
    assert noted.events == [("hook", 1), ("hook", 2), ("hook", "end", 2)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_after_the_running_step(tmp_path: Path, number: int) -> None:
    loop = Loop(tmp_path, hooks=[noted := Noted("hook", [])])
    loop.stop_by(number, at=2)
    assert loop.trainer.run() == number
    assert loop.trainer.stopped
    assert noted.events == [("hook", 1), ("hook", 2), ("hook", "end", 2)]
    assert len(metrics(tmp_path / "run")) == 2


def test_a_signal_before_the_first_step_leaves_it_out(tmp_path: Path) -> None:
    loop = Loop(tmp_path, hooks=[noted := Noted("hook", [])])
    loop.trainer.interruption.signal = signal.SIGTERM
    assert loop.trainer.run() == signal.SIGTERM
    assert (loop.events, noted.events) == ([], [("hook", "end", 0)])


@pytest.mark.parametrize("ended_by", ["last step", "hook"])
def test_a_signal_in_the_step_that_ends_the_loop_interrupts_nothing(tmp_path: Path, ended_by: str) -> None:
    def end(trainer: Trainer) -> None:
        trainer.done = ended_by == "hook" and trainer.step == 3

    steps = 3 if ended_by == "last step" else 6
    loop = Loop(tmp_path, f"--training.steps={steps}", hooks=[Noted("hook", [], end)])
    loop.stop_by(signal.SIGTERM, at=3)
    assert loop.trainer.run() is None
    assert loop.trainer.stopped
    assert loop.trained == 3


def test_divergence_ends_the_run_before_its_step_is_validated_or_saved(tmp_path: Path) -> None:
    results = [StepResult(1.0, 1.0), StepResult(math.nan, math.nan)]
    loop = Loop(tmp_path, FIRST_ENDS, results=results, hooks=[noted := Noted("hook", [])])
    with pytest.raises(UserError, match=r"^step 2: loss nan, gradient norm nan: training diverged; start anew in another"):
        loop.trainer.run()
    assert noted.events == [("hook", 1)]


AUTO = "resume from {2} with a lower rate, such as --resume=auto --optimizer.lr=0.005, or start anew"
BACK = "resume from {1} with a lower rate, such as --resume=step:1 --optimizer.lr=0.005, or start anew"


LEAVE_OUT = "leave out the samples of these steps, {samples}: "
FROM = "resume from {0}, such as {1} --training.skip_samples='{{samples}}'"
AGAIN = {
    1: FROM.format("{1}", "--resume=auto"),
    2: FROM.format("{2}", "--resume=auto"),
    "back": FROM.format("{1}", "--resume=step:1"),
}
NAN, INFINITE = StepResult(math.nan, math.nan), StepResult(1.0, math.inf)


@pytest.mark.parametrize(
    ("saved", "step", "result", "way", "without"),
    [
        ([1], 2, NAN, "start anew", AGAIN[1]),  # the weights of step 1 gave the loss of step 2, but so did the samples
        ([1, 2], 3, NAN, BACK, AGAIN[2]),
        ([1, 2], 3, INFINITE, AUTO, AGAIN[2]),  # those of step 2 gave a finite loss
        ([1, 2], 2, INFINITE, BACK, AGAIN["back"]),
        ([1, 2], 4, NAN, AUTO, AGAIN[2]),
    ],
)
def test_the_way_back_is_the_newest_checkpoint_that_still_computes(
    tmp_path: Path, saved: list[int], step: int, result: StepResult, way: str, without: str
) -> None:
    loop = Loop(tmp_path, FIRST_ENDS, results=[StepResult(1.0, 1.0)] * (step - 1) + [result])
    run = tmp_path / "run"
    names = {str(number): str(run / f"checkpoints/step_{number:08d}") for number in (1, 2)}
    for number in saved:
        Path(names[str(number)]).mkdir(parents=True)
        (Path(names[str(number)]) / "complete.json").touch()
    way = f"{way}.*, or {re.escape(LEAVE_OUT + without)}$"
    for name, text in {**names, "run": str(run)}.items():
        way = way.replace(f"{{{name}}}", text).replace(re.escape(f"{{{name}}}"), text)
    way = way.replace(re.escape("{samples}"), re.escape(f"[[{8 * step - 8}, {8 * step}]]"))
    found = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}"
    with pytest.raises(UserError, match=f"^{found}: training diverged; {way}") as error:
        loop.trainer.run()
    assert "delete" not in str(error.value)


def test_close_ends_reader_bar_and_files(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    file, closed = loop.trainer.metrics.file, []
    loop.trainer.progress.close = lambda: closed.append(True)  # type: ignore[method-assign]
    loop.trainer.close()
    assert file is not None
    assert (loop.loader.closed, closed, file.closed) == (True, [True], True)


def stop_some(rank: int, ranks: int, signals: dict[int, int], folder: Path) -> None:
    """Each rank's losses are its own; ranks of `signals` get theirs in the second of six steps."""
    results = [StepResult(10.0 * step + rank, float(step), {"gha": float(rank)}) for step in range(1, 7)]
    (folder / str(rank)).mkdir()
    noted = Noted("hook", [])
    with joined(rank, ranks, folder) as layout, Interruption() as interruption:
        loop = Loop(folder / str(rank), f"--run.folder={folder}/run", results=results, layout=layout, hooks=[noted])
        loop.trainer.interruption = interruption
        calls = iter(range(1, 7))
        loop.engine.during = lambda: os.kill(os.getpid(), signals[rank]) if next(calls) == 2 and rank in signals else None
        stopped_by = loop.trainer.run()
        loop.trainer.close()
    (folder / f"{rank}.json").write_text(json.dumps([stopped_by, noted.events]))


@pytest.mark.parametrize(
    ("signals", "stopped_by"),
    [
        ({2: signal.SIGTERM}, signal.SIGTERM),
        ({1: signal.SIGTERM, 2: signal.SIGINT}, signal.SIGINT),  # launchers pass Ctrl-C on as SIGTERM
    ],
)
def test_all_ranks_stop_at_the_same_step_by_the_same_signal(tmp_path: Path, signals: dict[int, int], stopped_by: int) -> None:
    (tmp_path / "run").mkdir()
    run_ranks(stop_some, 3, 3, signals, tmp_path)
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [
            stopped_by,
            [["hook", 1], ["hook", 2], ["hook", "end", 2]],
        ]
    found = [(line["step"], line["loss"], line["loss/gha"], line["grad_norm"]) for line in metrics(tmp_path / "run")]
    assert found == [(1, 10.0, 1.0, 1.0), (2, 20.0, 1.0, 2.0)]  # means over ranks; terms are parts of the loss
