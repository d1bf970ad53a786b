"""Averages of the weights, sharded as the weights are: a rank averages the fp32 parts that it writes into checkpoints.

`ExponentialAverage` follows the weights after every step. `LastSaves` keeps the weights of the last saves; whoever reads a
checkpoint takes their mean (pretrain/checkpoints/unsharded.py). Neither changes anything in training, and none needs a
collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from configs.schema import AverageConfig, Config
from pretrain.backends.base import Backend
from pretrain.checkpoints.resume import Read, Start
from pretrain.checkpoints.state import AVERAGE, AVERAGED_STEPS, WEIGHTS, Part, State, saved_kind, saved_kinds
from pretrain.loop.hooks import Hook

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer


def average_hooks(config: Config, backend: Backend) -> list[Hook]:
    """The hook of `training.average`, if that asks for one; `backend` has the weights that training starts from."""
    average = config.training.average
    if average == AverageConfig():
        return []
    weights = [part for part in backend.state().parts if part.kind == WEIGHTS and part.owned]
    if average.decay is not None:
        return [ExponentialAverage(average.decay, weights)]
    assert average.last is not None
    return [LastSaves(average.last, config.checkpoint.every_steps, weights)]


def left_behind(config: Config, start: Start) -> str | None:
    """A line for the user of a run without an average that resumes from a checkpoint with one."""
    if config.training.average != AverageConfig() or start.config.training.average == AverageConfig():
        return None
    return f"average ends: training.average is null, so this run's checkpoints hold none; that of {start.folder} stays there"


def decay_of(step: int, decay: float) -> float:
    """What remains of an exponential average at the `step`th step that it follows, counted from 1: none at the first.

    It rises like TensorFlow's `min(decay, (1 + n) / (10 + n))`, so the average reaches back over about a ninth of the steps
    so far until `decay` is less than that, and a short run's is not that of its first weights.
    """
    return min(decay, (step - 1) / (step + 8))


class ExponentialAverage(Hook):
    """An exponential moving average of the weights, beside them on their device; checkpoints hold it and its count of steps."""

    priority = 20

    def __init__(self, decay: float, weights: Sequence[Part]) -> None:
        """`weights` are views of the engine's memory, which steps write into."""
        self.decay = decay
        self._weights = [part.tensor for part in weights]
        self._parts = [replace(part, kind=AVERAGE, tensor=part.tensor.clone()) for part in weights]
        self._steps = torch.zeros((), dtype=torch.float64)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.last.skipped:
            return
        self._steps += 1
        if self._parts:  # a rank may own none
            moved = 1 - decay_of(int(self._steps), self.decay)
            torch._foreach_lerp_([part.tensor for part in self._parts], self._weights, moved)

    def state(self) -> State:
        return State(self._parts, {AVERAGED_STEPS: [self._steps]})

    def load_state(self, start: Start, read: Read) -> str | None:
        if AVERAGE not in start.index.kinds or AVERAGED_STEPS not in start.train.scalars:
            return f"average starts after step {start.train.step}: {start.folder} holds no exponential one"
        read(self.state())
        return None


class LastSaves(Hook):
    """The weights of the last saves, in host memory.

    Those of steps that are multiples of `every_steps` count, and those of the checkpoint itself, so an interruption, which
    saves its step, too, changes no later average. Checkpoints hold all but their own weights a second time.
    """

    priority = 20

    def __init__(self, saves: int, every_steps: int, weights: Sequence[Part]) -> None:
        """`saves`: how many are averaged. `weights` are views of the engine's memory."""
        self.saves, self.every_steps, self._weights = saves, every_steps, weights
        self._saved: list[list[Tensor]] = []  # newest first
        self._is_now = False  # whether the newest are the weights of now

    def after_step(self, trainer: Trainer) -> None:
        self._is_now = trainer.step % self.every_steps == 0
        if self._is_now:
            self._keep()
        del self._saved[self.saves - (not self._is_now) :]

    def state(self) -> State:
        return self._state_of(self._saved[self._is_now :])

    def load_state(self, start: Start, read: Read) -> str | None:
        goes_on = start.config.training.average.last is not None
        if goes_on:
            kinds = saved_kinds(start.index.kinds)[: self.saves - 1]
            self._saved = [[torch.empty_like(part.tensor, device="cpu") for part in self._weights] for _ in kinds]
            read(self._state_of(self._saved))
        every_steps = start.config.checkpoint.every_steps
        self._is_now = not goes_on or (every_steps > 0 and start.train.step % every_steps == 0)
        if self._is_now:
            self._keep()
        return None if goes_on else f"average starts with {start.folder}: it holds no weights of earlier saves"

    def _keep(self) -> None:
        self._saved.insert(0, [part.tensor.detach().to("cpu", copy=True) for part in self._weights])

    def _state_of(self, saved: Sequence[Sequence[Tensor]]) -> State:
        parts = [
            replace(part, kind=kind, tensor=tensor, fixed=True)
            for kind, tensors in zip(map(saved_kind, count(1)), saved, strict=False)
            for part, tensor in zip(self._weights, tensors, strict=True)
        ]
        return State(parts, {})
