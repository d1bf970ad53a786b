"""Worlds of forked ranks that run one command after the other: starting a process costs more than a tiny run."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers import free_port, launched_environments
from tests.ranks import Ranks

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer

SHOWN = 6000  # characters of the output of a run that failed


class RunFailedError(Exception):
    """A run that should have ended well, with its output."""


class Worlds:
    """`launch/pretrain.py` on any number of processes, in a world for each number that lives until a run in it fails."""

    def __init__(self, seconds: float = 120) -> None:
        self.seconds = seconds
        self._worlds: dict[int, tuple[Ranks, Path, ExitStack]] = {}
        self._jobs = 0

    def __enter__(self) -> Worlds:
        return self

    def __exit__(self, *error: object) -> None:
        for processes in list(self._worlds):
            self._end(processes)

    def pretrain(self, processes: int, arguments: Sequence[str], saves_first: bool = False) -> None:
        """Run it to its end; RunFailedError with its output. With `saves_first`, it saves what it starts from before a step."""
        ranks, folder, _ = self._worlds[processes] if processes in self._worlds else self._start(processes)
        self._jobs += 1
        done, job = folder / f"done_{self._jobs}", {"arguments": list(arguments), "saves_first": saves_first}
        line = json.dumps({**job, "port": free_port(), "done": str(done)}) + "\n"
        written = [len(ranks.output(rank) + ranks.errors(rank)) for rank in range(processes)]
        for rank in range(processes):
            with (folder / f"{rank}.jobs").open("a") as jobs:
                jobs.write(line)
        deadline = time.monotonic() + self.seconds
        while not all(Path(f"{done}.{rank}").exists() for rank in range(processes)):
            if any(status is not None for status in ranks.statuses()) or time.monotonic() > deadline:
                time.sleep(2)  # others may be about to say why
                hung = "" if time.monotonic() < deadline else f"hangs after {self.seconds:.0f} s\n"
                said = [(ranks.output(r) + ranks.errors(r))[written[r] :][-SHOWN:] for r in range(processes)]
                self._end(processes)
                raise RunFailedError(hung + "\n".join(f"rank {rank}:\n{text}" for rank, text in enumerate(said)))
            time.sleep(0.01)

    def _start(self, processes: int) -> tuple[Ranks, Path, ExitStack]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="world-")))
            for rank in range(processes):
                (folder / f"{rank}.jobs").touch()
            arguments = [(str(folder / f"{rank}.jobs"), rank) for rank in range(processes)]
            ranks = stack.enter_context(Ranks(serve, launched_environments(processes), arguments))
            self._worlds[processes] = ranks, folder, stack.pop_all()
        return self._worlds[processes]

    def _end(self, processes: int) -> None:
        self._worlds.pop(processes)[2].close()


def serve(jobs: str, rank: int) -> None:
    """In a rank: run what the lines of the file `jobs` say, as they come, until the process is killed."""
    from launch.pretrain import main

    with Path(jobs).open() as file:
        for job in _lines(file):
            os.environ["MASTER_PORT"] = str(job["port"])
            sys.argv = ["launch/pretrain.py", *job["arguments"]]
            with _saving_first() if job["saves_first"] else ExitStack():
                status = main()
            sys.stdout.flush()
            if status:
                raise SystemExit(status)
            Path(f"{job['done']}.{rank}").touch()


def _lines(file: Any) -> Iterator[Any]:
    text = ""
    while True:
        text += file.readline()
        if text.endswith("\n"):
            yield json.loads(text)
            text = ""
        else:
            time.sleep(0.02)


@contextmanager
def _saving_first() -> Iterator[None]:
    """The command has no word for this: a run that has made no step has nothing new to save."""
    from pretrain.loop.hooks import Checkpoints
    from pretrain.loop.trainer import Trainer

    run: Any = Trainer.run

    def save_and_run(trainer: Trainer) -> int | None:
        trainer.hook(Checkpoints).save_now(trainer)
        stopped_by: int | None = run(trainer)
        return stopped_by

    changed: Any = Trainer
    changed.run = save_and_run
    try:
        yield
    finally:
        changed.run = run
