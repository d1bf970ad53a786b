"""The loop's neighbours with known numbers: an engine without a model, batches without data. What is tested is the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.loader import Batch
from pretrain.backends.base import Accepts, StepResult, finite
from pretrain.checkpoints.state import State
from pretrain.distributed.layout import Layout
from pretrain.loop.hooks import Hook
from pretrain.loop.skipping import Skipping
from pretrain.loop.trainer import Trainer
from pretrain.objectives.base import WeightedSum, weighted_sum
from tests.helpers import write_run

ONE_STEP = ("--training.steps=1", "--schedule.warmup_steps=0")


class Engine:
    """Reports `results` one after the other; the loss of a label is the label. Notes its calls, and calls `during` in each."""

    def __init__(self, results: Sequence[StepResult], events: list[Any]) -> None:
        self.results, self.events = iter(results), events
        self.during: Callable[[], object] = lambda: None
        self.module, self.layers = nn.Identity(), None

    def train_step(self, micro_batches: list[Batch], learning_rate: float, accepts: Accepts = finite) -> StepResult:
        self.events.append(("train", micro_batches, learning_rate))
        self.during()
        result = next(self.results)
        return replace(result, skipped=not accepts(result.grad_norm, lambda: result.loss))

    def state(self) -> State:
        """Nothing that a checkpoint keeps."""
        return State([], {})

    def eval_loss(self, batch: Batch) -> WeightedSum:
        self.events.append("evaluate")
        self.during()
        return weighted_sum(batch.labels.double(), batch.weights)


class Steps:
    """A loader whose micro-batches are the number of the step."""

    def __init__(self) -> None:
        self.closed = False

    def step(self, step: int) -> Any:
        return f"batches of {step}"

    def close(self) -> None:
        self.closed = True


class Held:
    """A validation loader of these labels; every label counts, or as much as `weights` say."""

    def __init__(self, labels: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> None:
        self.labels, self.weights, self.samples = labels, weights, len(labels)

    def __iter__(self) -> Iterator[Batch]:
        for number, labels in enumerate(self.labels):
            row = torch.tensor([labels])
            yield Batch(row, row, None if self.weights is None else torch.tensor([self.weights[number]]))


class Noted(Hook):
    """A hook that notes its calls."""

    def __init__(self, name: str, events: list[Any], act: Callable[[Trainer], object] = lambda trainer: None) -> None:
        self.name, self.events, self.act = name, events, act

    def after_step(self, trainer: Trainer) -> None:
        self.events.append((self.name, trainer.step))
        self.act(trainer)

    def at_end(self, trainer: Trainer) -> None:
        self.events.append((self.name, "end", trainer.step))


def configuration(folder: Path, *overrides: str) -> Config:
    """Eight sequences of 16 tokens a step, a peak rate of 1e-2 after two steps."""
    config = load_config(write_run(folder, folder / "data"), overrides).resolved(50)
    Path(config.run.folder).mkdir(exist_ok=True)
    return config


class Saves:
    """A saver that notes the step of each checkpoint; none of them is there."""

    def __init__(self, events: list[Any], asynchronous: bool = False) -> None:
        self.events, self.asynchronous = events, asynchronous
        self.pending: int | None = None
        self.written = False  # of the pending one
        self.cleared = 0  # how often old ones were deleted
        self.faults: dict[str, Exception] = {}  # what `begin` or `finish` raise next

    def begin(self, step: int, state: object, write_more: object, waits: bool) -> None:
        assert self.pending is None
        if fault := self.faults.pop("begin", None):
            raise fault
        self.pending = step
        self.events.append(("waits" if waits else "copied", step))

    def finish(self) -> Path:
        step, self.pending, self.written = self.pending, None, False
        assert step is not None
        if fault := self.faults.pop("finish", None):
            raise fault
        self.events.append(step)
        return Path(f"step {step}")

    def clear_old(self) -> None:
        self.cleared += 1

    def close(self, waits: bool = True) -> None:
        self.events.append("closed" if waits else "left")


class Loop:
    """A trainer between such neighbours."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        hooks: Sequence[Hook] = (),
        results: Sequence[StepResult] | None = None,
        first_step: int = 0,
        layout: Layout | None = None,
        events: list[Any] | None = None,
    ) -> None:
        self.events: list[Any] = [] if events is None else events
        self.config = configuration(folder, *overrides)
        losses = [StepResult(float(step), 1.0) for step in range(first_step + 1, self.config.training.steps + 1)]
        self.engine = Engine(losses if results is None else results, self.events)
        engine: Any = self.engine
        self.loader = Steps()
        loader: Any = self.loader
        layout = layout or Layout()
        hooks = [*hooks, Skipping(self.config, layout)]
        self.trainer = Trainer(self.config, layout, engine, loader, hooks, first_step)

    @property
    def trained(self) -> int:
        """Steps taken."""
        return sum(isinstance(event, tuple) and event[0] == "train" for event in self.events)

    def stop_by(self, number: int, at: int) -> None:
        """A signal arrives while the engine is called for the `at`th time."""
        calls = iter(range(1, 1000))

        def arrive() -> None:
            if next(calls) == at:
                self.trainer.interruption.signal = number

        self.engine.during = arrive
