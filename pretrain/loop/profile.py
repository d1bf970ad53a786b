"""A profile of some steps: a trace of torch's profiler, where their time went by part, and on GPUs who holds memory."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from configs.durable import write_text
from pretrain.backends.base import Timed
from pretrain.distributed.collectives import together
from pretrain.loop.hooks import Hook
from pretrain.loop.profiled_steps import ProfiledSteps
from pretrain.report.step_parts import RANGE, STEP, step_parts

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer

FOLDER = "profile"  # in a run's folder
MOST_ALLOCATIONS = 1_000_000  # of which a snapshot tells; older ones are dropped


def _named(timed: Timed) -> AbstractContextManager[object]:
    return record_function(RANGE + timed.part)


class Profile(Hook):
    """Profiles the steps that were asked for, from the end of the step before to the end of the last one's hooks.

    Ranks that hold copies of what another one holds write nothing, unless all are asked for. A trace that cannot be written is
    a warning.
    """

    priority: ClassVar[int] = 99  # a step begins when all hooks of the one before have acted

    def __init__(self, asked: ProfiledSteps) -> None:
        self.asked = asked
        self._profiler: profile | None = None
        self._step: Any = None  # the open range of a step
        self._stop_watching: Callable[[], None] = lambda: None

    def begin(self, trainer: Trainer) -> None:
        asked, step = self.asked, trainer.step
        if step >= asked.last:
            trainer.progress.say(f"profile step {step} comes after steps {asked.first} to {asked.last}: nothing to profile")
        elif step >= asked.first - 1:
            self._start(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if self._step is not None:
            self._end_step()
        if trainer.step == self.asked.first - 1:
            self._start(trainer)
        elif trainer.step == self.asked.last or trainer.stopped or trainer.done:
            self._finish(trainer)
        elif self._profiler is not None:
            self._begin_step(trainer)

    def at_end(self, trainer: Trainer) -> None:
        if self._step is not None:  # the loop has ended by an error in the middle of a step
            self._end_step()
            self._finish(trainer)

    def close(self, waits: bool) -> None:
        self._stop_watching()
        if self._step is not None:
            self._end_step()
        if self._profiler is not None:
            with suppress(RuntimeError):
                self._profiler.stop()
            self._profiler = None

    def _start(self, trainer: Trainer) -> None:
        together(lambda: self._start_own(trainer))  # so that no rank's first step waits for others to have started
        if self._profiler is not None:
            self._begin_step(trainer)

    def _start_own(self, trainer: Trainer) -> None:
        if not self.asked.all_ranks and trainer.layout.coordinate("data") > 0:
            return
        on_gpu = trainer.layout.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profiler = profile(activities=activities)
        trainer.parts.watch(_named)
        self._stop_watching = lambda: self._leave(trainer)
        if self.asked.memory:
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        self._profiler.start()

    def _leave(self, trainer: Trainer) -> None:
        self._stop_watching = lambda: None
        trainer.parts.leave(_named)
        if self.asked.memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _begin_step(self, trainer: Trainer) -> None:
        self._step = record_function(f"{STEP}{trainer.step + 1}")
        self._step.__enter__()

    def _end_step(self) -> None:
        self._step.__exit__(None, None, None)
        self._step = None

    def _finish(self, trainer: Trainer) -> None:
        """Stop, write and show. No collective runs: other ranks wait at their next one."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = Path(trainer.config.run.folder) / FOLDER / self.asked.words
        path = folder / f"rank_{trainer.layout.rank:05d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.asked.memory:
                torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")
            self._stop_watching()
            self._write(trainer, profiler, path)
        except OSError as error:
            self._stop_watching()
            print(f"warning: {folder}: the profile cannot be written ({error.strerror})", file=sys.stderr, flush=True)

    def _write(self, trainer: Trainer, profiler: profile, path: Path) -> None:
        plain, packed = Path(f"{path}.json.unfinished"), Path(f"{path}.pt.trace.json.gz")
        try:
            profiler.export_chrome_trace(str(plain))
            text = plain.read_bytes()
            with gzip.open(f"{packed}.unfinished", "wb", compresslevel=5) as file:
                file.write(text)
            Path(f"{packed}.unfinished").replace(packed)
        finally:
            plain.unlink(missing_ok=True)
        found = step_parts(json.loads(text)["traceEvents"])
        rank = trainer.layout.rank
        write_text(Path(f"{path}.parts.json"), json.dumps({"rank": rank, **asdict(found)}, indent=1) + "\n")
        trainer.progress.say(f"profile of steps {found.steps[0]} to {found.steps[-1]}, rank {rank}: {packed}\n{found.table()}")
