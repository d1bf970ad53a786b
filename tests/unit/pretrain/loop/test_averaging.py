"""Averages of known weights: what follows each step, what checkpoints hold, what a run resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.load import load_config
from pretrain.backends.base import StepResult
from pretrain.checkpoints.files import read_index
from pretrain.checkpoints.folder import ENGINE_FOLDER, TrainState, read_config, read_state
from pretrain.checkpoints.resume import Resumer, Start
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.state import WEIGHTS, Part, State
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.layout import Layout
from pretrain.loop.averaging import ExponentialAverage, LastSaves, average_hooks, decay_of, left_behind
from pretrain.loop.hooks import Checkpoints, Hook
from tests.helpers import write_run
from tests.random_checkpoint import write_checkpoint
from tests.unit.pretrain.loop.engine import Loop

STEPS = "--training.steps=7"


class Weights:
    """An engine's weights, which grow by their step's number in each step: after step s, every value is s (s + 1) / 2."""

    def __init__(self) -> None:
        self.tensor, self.step = torch.zeros(2, 3), 0
        others = Part("v", WEIGHTS, (3,), (0,), self.tensor[0], owned=False)
        self.parts = [Part("w", WEIGHTS, (2, 3), (0, 0), self.tensor), others]

    def take_step(self) -> None:
        self.step += 1
        self.tensor += self.step

    def state(self) -> State:
        return State([*self.parts, Part("w", "exp_avg", (2, 3), (0, 0), torch.zeros(2, 3))], {})


def after(step: int) -> float:
    return step * (step + 1) / 2


def trained(folder: Path, *overrides: str, note: Callable[[Hook], object] = lambda hook: None) -> None:
    """A run of such weights with the average of its configuration; `note` gets that hook after each step."""
    weights = Weights()
    loop = Loop(folder, STEPS, *overrides)
    loop.engine.during, loop.engine.state = weights.take_step, weights.state  # type: ignore[method-assign]
    engine: Any = weights
    (hook,) = average_hooks(loop.config, engine)
    saver = Saver(CheckpointStore(Path(loop.config.run.folder)), Layout(), loop.config, "d" * 64, "{}")
    loop.trainer.hooks = [hook, Checkpoints(saver, loop.config.checkpoint.every_steps)]
    while loop.trainer.step < loop.config.training.steps:
        loop.trainer.advance()
        note(hook)
    for each in loop.trainer.hooks:
        each.at_end(loop.trainer)
    saver.close()


def values(state: State) -> dict[str, set[float]]:
    assert {part.name for part in state.parts} <= {"w"}  # what the rank does not own is another's
    return {part.kind: set(part.tensor.flatten().tolist()) for part in state.parts}


def stored(folder: Path, step: int) -> dict[str, set[float]]:
    start = start_of(folder, step)
    kinds = sorted(start.index.kinds - {WEIGHTS, "exp_avg"})
    state = State([Part("w", kind, (2, 3), (0, 0), torch.zeros(2, 3)) for kind in kinds], {})
    reading(start)(state)
    return values(state)


def start_of(run: Path, step: int) -> Start:
    folder = CheckpointStore(run).path(step)
    return Start(folder, read_config(folder), read_state(folder), read_index(folder / ENGINE_FOLDER))


def reading(start: Start) -> Callable[[State], None]:
    return Resumer(CheckpointStore(start.folder), Layout(), start.config, "", "").reading(start)


def test_the_decay_rises_as_tensorflows_does() -> None:
    for n in range(2000):
        assert decay_of(n + 2, 0.99) == min(0.99, (1 + n) / (10 + n))
    assert decay_of(1, 0.99) == 0


def test_an_exponential_average_follows_every_step(tmp_path: Path) -> None:
    found: list[float] = []
    expected, average = [], 0.0
    for step in range(1, 8):
        kept = min(0.25, (step - 1) / (step + 8))
        average = kept * average + (1 - kept) * after(step)
        expected.append(average)
    trained(tmp_path, "--training.average.decay=0.25", note=lambda hook: found.extend(values(hook.state())["average"]))
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[0] == after(1)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_the_last_saves_are_those_of_every_n_steps_and_the_checkpoints_own(tmp_path: Path, asynchronous: str) -> None:
    counts: list[int] = []

    def note(hook: Hook) -> None:
        assert isinstance(hook, LastSaves)
        counts.append(len(hook._saved))

    overrides = ["--training.average.last=3", "--checkpoint.every_steps=2", "--checkpoint.keep_last=9"]
    trained(tmp_path, *overrides, f"--checkpoint.asynchronous={asynchronous}", note=note)
    run = tmp_path / "run"
    assert stored(run, 2) == {}
    assert stored(run, 4) == {"saved_1": {after(2)}}
    assert stored(run, 6) == {"saved_1": {after(4)}, "saved_2": {after(2)}}
    assert stored(run, 7) == {"saved_1": {after(6)}, "saved_2": {after(4)}}
    assert counts == [0, 1, 1, 2, 2, 3, 2]


RESUMED: list[tuple[str, int, str, dict[str, set[float]], str | None]] = [
    # of the checkpoint, its step; of the run, what it has before its first step, what it says
    ("last=3", 6, "last=3", {"saved_1": {10.0}, "saved_2": {3.0}}, None),
    ("last=3", 7, "last=3", {"saved_1": {21.0}, "saved_2": {10.0}}, None),
    ("last=3", 7, "last=2", {"saved_1": {21.0}}, None),
    ("last=3", 6, "last=9", {"saved_1": {10.0}, "saved_2": {3.0}}, None),
    ("decay=0.5", 6, "last=3", {}, "average starts with {folder}: it holds no weights of earlier saves"),
    ("last=3", 6, "decay=0.5", {"average": {21.0}}, "average starts after step 6: {folder} holds no exponential one"),
]


def hook_of(folder: Path, average: str, weights: Weights) -> Hook:
    config = load_config(write_run(folder, folder / "data"), [f"--training.average.{average}", "--checkpoint.every_steps=2"])
    engine: Any = weights
    (hook,) = average_hooks(config, engine)
    return hook


@pytest.mark.parametrize(("before", "step", "now", "expected", "said"), RESUMED)
def test_what_a_run_resumes(
    tmp_path: Path, before: str, step: int, now: str, expected: dict[str, set[float]], said: str | None
) -> None:
    trained(tmp_path, f"--training.average.{before}", "--checkpoint.every_steps=2", "--checkpoint.keep_last=9")
    start, weights = start_of(tmp_path / "run", step), Weights()
    weights.tensor.fill_(after(step))  # as the engine has loaded them
    hook = hook_of(tmp_path, now, weights)
    line = hook.load_state(start, reading(start))
    assert values(hook.state()) == expected
    assert line == (None if said is None else said.format(folder=start.folder))


def test_an_exponential_average_goes_on_with_another_decay(tmp_path: Path) -> None:
    trained(tmp_path, "--training.average.decay=0.25", "--checkpoint.every_steps=2", "--checkpoint.keep_last=9")
    start, weights = start_of(tmp_path / "run", 6), Weights()
    hook = hook_of(tmp_path, "decay=0.01", weights)
    assert hook.load_state(start, reading(start)) is None
    (old,) = stored(tmp_path / "run", 6)["average"]
    assert values(hook.state()) == {"average": {old}}
    weights.tensor.fill_(100.0)
    hook.after_step(after_a_step(7))
    (new,) = values(hook.state())["average"]
    assert new == pytest.approx(0.01 * old + 0.99 * 100)


def test_an_average_that_starts_at_a_save_counts_it(tmp_path: Path) -> None:
    trained(tmp_path, "--training.average.decay=0.25", "--checkpoint.every_steps=7")
    start, weights = start_of(tmp_path / "run", 7), Weights()
    weights.tensor.fill_(after(7))
    hook = hook_of(tmp_path, "last=2", weights)
    hook.load_state(start, reading(start))
    (tmp_path / "other").mkdir()
    loop = Loop(tmp_path / "other", STEPS, first_step=5)
    loop.engine.during = lambda: weights.tensor.fill_(50.0)
    loop.trainer.hooks = [hook]
    loop.trainer.advance()
    assert values(hook.state()) == {"saved_1": {after(7)}}


def test_a_run_without_an_average_says_what_it_leaves(tmp_path: Path) -> None:
    plain = load_config(write_run(tmp_path, tmp_path / "data")).resolved(300)
    averaged = load_config(tmp_path / "run.yaml", ["--training.average.decay=0.5"]).resolved(300)
    said = []
    for before, now in ((averaged, plain), (averaged, averaged), (plain, plain), (plain, averaged)):
        folder = write_checkpoint(before, {WEIGHTS: {"w": torch.ones(2)}}, TrainState(3, 1, "d" * 64))
        said.append(left_behind(now, start_of(tmp_path / "run", 3)))
    line = f"average ends: training.average is null, so this run's checkpoints hold none; that of {folder} stays there"
    assert said == [line, None, None, None]


def test_a_skipped_step_moves_no_average() -> None:
    weights = Weights()
    hook = ExponentialAverage(0.5, weights.parts[:1])
    for step, skipped in ((1, False), (2, True), (3, False)):
        weights.tensor.fill_(step)
        hook.after_step(after_a_step(step, skipped))
    assert values(hook.state())["average"].pop() == pytest.approx(0.1 * 1 + 0.9 * 3)
    assert hook.state().scalars["average_steps"][0] == 2


def after_a_step(step: int, skipped: bool = False) -> Any:
    """What a hook knows of a trainer."""
    return SimpleNamespace(step=step, last=StepResult(1.0, 1.0, skipped=skipped))


def test_a_rank_that_owns_nothing_averages_nothing() -> None:
    for hook in (ExponentialAverage(0.5, []), LastSaves(2, 1, [])):
        hook.after_step(after_a_step(1))
        assert hook.state().parts == []
