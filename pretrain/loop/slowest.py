"""Which rank holds up the others: its own work in a step, waiting left out, compared over ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from configs.schema import Config
from pretrain.backends.base import Timed
from pretrain.distributed.collectives import mean_over_ranks
from pretrain.distributed.layout import Layout
from pretrain.loop.hooks import Hook
from pretrain.report.step_parts import ENGINE, LOADER, OURS

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer

NOTABLE = 0.05  # of a step
LOADS, COMPUTES, REPORTS = "its loader", "its model's forward pass", "its reports"
_WORKS = (LOADS, COMPUTES, REPORTS)


class Work:
    """Seconds that this rank works in a step, in what never waits for another rank. Watches the parts of a step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._inside = 0  # an outer part is being timed
        self._trains = False  # inside the engine's step
        self._host = defaultdict[str, float](float)
        self._events = list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    @contextmanager
    def __call__(self, timed: Timed) -> Iterator[None]:
        if timed.part == ENGINE:
            self._trains = True
            yield
            self._trains = False
        elif timed.waits or self._inside or not (self._trains or timed.part in (LOADER, OURS)):
            yield
        else:
            self._inside += 1
            try:
                with self._timed(timed):
                    yield
            finally:
                self._inside -= 1

    def begin(self) -> None:
        """A step follows."""
        self._host.clear()
        self._events.clear()

    def seconds(self) -> list[float]:
        """Of each kind of work since `begin`. The step is over: no GPU still works at it."""
        computed = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        return [self._host[work] + (computed if work == COMPUTES else 0.0) for work in _WORKS]

    @contextmanager
    def _timed(self, timed: Timed) -> Iterator[None]:
        work = {LOADER: LOADS, OURS: REPORTS}.get(timed.part, COMPUTES)
        if self._on_gpu and work == COMPUTES:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._host[work] += time.perf_counter() - started


class Slowest(NamedTuple):
    """The rank that works longest, how much longer than the median of the others, and at what above all."""

    rank: int
    lag: float
    work: str


def slowest(seconds: list[list[float]]) -> Slowest:
    """From the seconds of each kind of work of every rank; of two ranks or more."""
    totals = [sum(own) for own in seconds]
    rank = max(range(len(totals)), key=totals.__getitem__)
    others = [own for number, own in enumerate(seconds) if number != rank]
    ahead = [own - median(of_work) for own, of_work in zip(seconds[rank], zip(*others, strict=True), strict=True)]
    lag = totals[rank] - median(sum(own) for own in others)
    return Slowest(rank, max(0.0, lag), _WORKS[max(range(len(ahead)), key=ahead.__getitem__)])


class SlowestRank(Hook):
    """Writes with each line of output which rank was slowest, and says so if one lags notably twice in a row.

    Only durations are compared, not clocks. At steps that are not reported nothing is measured.
    """

    priority: ClassVar[int] = 5  # before hooks that work with the model themselves

    def __init__(self, config: Config, layout: Layout) -> None:
        self._every, self._steps, self._layout = config.logging.every_steps, config.training.steps, layout
        self._work = Work(layout.device)
        self._watching = False
        self._lagged: int | None = None  # the rank that lagged notably at the last report
        self._said: int | None = None

    def begin(self, trainer: Trainer) -> None:
        self._prepare(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if self._watching:
            self._report(trainer)
        self._prepare(trainer)

    def at_end(self, trainer: Trainer) -> None:
        self._watch(trainer, False)

    def _prepare(self, trainer: Trainer) -> None:
        """Watch the coming step if it is one to report."""
        step = trainer.step + 1
        self._watch(trainer, step == self._steps or (step < self._steps and step % self._every == 0))
        self._work.begin()

    def _watch(self, trainer: Trainer, wanted: bool) -> None:
        if wanted != self._watching:
            (trainer.parts.watch if wanted else trainer.parts.leave)(self._work)
            self._watching = wanted

    def _report(self, trainer: Trainer) -> None:
        ranks, kinds = self._layout.world_size, len(_WORKS)
        shared = [0.0] * (ranks * kinds)
        shared[self._layout.rank * kinds : (self._layout.rank + 1) * kinds] = self._work.seconds()
        of_all = [value * ranks for value in mean_over_ranks(shared, self._layout.device)]
        found = slowest([of_all[rank * kinds : (rank + 1) * kinds] for rank in range(ranks)])
        trainer.metrics.write(trainer.step, {"slowest_rank": found.rank, "slowest_lag_seconds": found.lag})
        lags = found.rank if found.lag > NOTABLE * trainer.seconds else None
        if lags is not None and lags == self._lagged and lags != self._said:
            trainer.progress.say(
                f"step {trainer.step}: rank {lags} holds up the others: it works {found.lag:.3g} s longer, "
                f"{found.lag / trainer.seconds:.0%} of the step, above all in {found.work}"
            )
        self._said = lags if lags == self._lagged else None
        self._lagged = lags
