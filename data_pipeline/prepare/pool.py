"""Processes that do one task after the other, for a parent that stays free to answer signals.

They are new interpreters, not forks: libraries that encode run threads, and a fork of a process with threads may hang. If the
parent dies, they end with their task.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 4  # tasks for each worker that are handed out before the oldest is done
_ADVICE = ("use fewer --workers", "the same command resumes")
_PROJECT = Path(__file__).resolve().parents[2]


class WorkerLostError(UserError):
    """A process ended without an answer."""


class Worker:
    """A process that does one task after the other; results come in the order of tasks."""

    def __init__(self, work: Callable[[Any], Any], advice: tuple[str, str] = _ADVICE) -> None:
        """`advice`: how to need less memory, and what to do after it was lost."""
        self._advice = advice
        self.connection, theirs = Pipe()
        code = f"from data_pipeline.prepare.pool import serve; serve({theirs.fileno()})"
        path = os.pathsep.join([str(_PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],  # -P: without modules of the current folder
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path},
                process_group=0,  # Ctrl-C reaches the parent only, which ends its workers
            )
        self.number = -1  # of the task at hand
        self._work: list[object] = [work]  # sent with the first task: until the process has started, sending would block

    def send(self, number: int, task: object) -> None:
        self.number = number
        try:
            while self._work:
                self.connection.send(self._work.pop())
            self.connection.send(task)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Any:
        """What the task at hand returned. UserError or OSError if it raised one; RuntimeError with the traceback of others."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if kind == "user":
            raise UserError(value)
        if kind == "system":
            raise OSError(*value)
        if kind == "fault":
            raise RuntimeError(f"in a worker process:\n{value}")
        return value

    def _lost(self) -> WorkerLostError:
        status = self._process.wait()
        why = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        use_less, resume = self._advice
        hint = f", perhaps for lack of memory (then {use_less})" if status == -9 else ""
        return WorkerLostError(f"a worker process {why}{hint}; {resume}")

    def kill(self) -> None:
        """A thread that waits in `receive` gets its error."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self.kill()
        self.connection.close()


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Generator[Result, None, None]:
    """`work(task)` for each of `tasks`, in their order: in `workers` processes, or with 0 in this one.

    `work` and tasks are pickled. Each worker keeps one copy of `work`, so what that loads is loaded once.
    """
    if workers == 0:
        yield from map(work, tasks)
        return
    everyone: list[Worker] = []
    try:
        yield from _hand_out(work, iter(tasks), workers, everyone)
    finally:
        for worker in everyone:
            worker.end()


def _hand_out(work: Callable[[Task], Result], tasks: Iterator[Task], most: int, everyone: list[Worker]) -> Iterator[Result]:
    first = list(islice(tasks, most))
    everyone += [Worker(work) for _ in first]
    idle = everyone[::-1]
    results: dict[int, Result] = {}
    given = taken = 0
    for task in chain(first, tasks):
        while not idle or given - taken > _AHEAD * most:
            idle += _collect(everyone, results)
            while taken in results:
                yield results.pop(taken)
                taken += 1
        idle.pop().send(given, task)
        given += 1
    while taken < given:
        while taken not in results:
            _collect(everyone, results)
        yield results.pop(taken)
        taken += 1


def _collect(everyone: list[Worker], results: dict[int, Any]) -> list[Worker]:
    """Wait for results; the workers that have given one."""
    busy = {worker.connection: worker for worker in everyone if worker.number >= 0}
    done = [busy[connection] for connection in wait(list(busy)) if isinstance(connection, Connection)]
    for worker in done:
        results[worker.number] = worker.receive()
        worker.number = -1
    return done


def serve(handle: int) -> None:
    """What a worker process does until its parent has no more tasks, which decides on signals for both."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Slurm sends them to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(handle)
    try:
        work = connection.recv()
        while True:
            task = connection.recv()
            connection.send_bytes(pickle.dumps(_answer(work, task), protocol=5))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended
        os._exit(0)


def _answer(work: Callable[[Any], Any], task: object) -> tuple[str, Any]:
    try:
        return "result", work(task)
    except UserError as error:
        return "user", str(error)
    except OSError as error:
        return "system", (error.errno, error.strerror or str(error))
    except Exception:
        return "fault", traceback.format_exc()
