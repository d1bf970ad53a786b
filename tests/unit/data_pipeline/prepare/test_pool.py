"""Tasks in processes: results in order, errors of any kind, and processes that end with their parent."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from configs.errors import UserError
from data_pipeline.prepare import pool
from data_pipeline.prepare.pool import WorkerLostError, in_order


def test_results_come_in_order_and_tasks_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[float]:
        for number in range(20):
            taken.append(number)
            yield 0.01 * (number % 3)

    most = 0
    results: list[None] = []
    for result in in_order(time.sleep, tasks(), 2):
        results.append(result)
        most = max(most, len(taken) - len(results))
    assert results == [None] * 20
    assert most <= 10
    assert list(in_order(abs, range(-9, 9), 3)) == list(map(abs, range(-9, 9)))
    assert list(in_order(abs, [], 3)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_tasks(workers: int, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        list(in_order(os.listdir, [str(tmp_path), str(tmp_path / "none")], workers))
    assert raised.value.errno == errno.ENOENT
    with pytest.raises(RuntimeError if workers else ZeroDivisionError, match="zero"):
        list(in_order(divmod_by, [1, 0], workers))
    with pytest.raises(UserError, match=r"^no$"):
        list(in_order(refuse, [1], workers))


def divmod_by(number: int) -> object:
    return divmod(1, number)


def refuse(_: object) -> object:
    raise UserError("no")


def test_a_worker_that_is_killed() -> None:
    with pytest.raises(WorkerLostError, match=r"was ended by signal 9, perhaps for lack of memory"):
        list(in_order(kill_self, [1], 1))


def kill_self(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_when_their_parent_is_killed() -> None:
    code = "import time; from data_pipeline.prepare.pool import in_order; list(in_order(time.sleep, [0.1, 4], 2))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=pool._PROJECT)
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 30
    while len(workers) < 2 and time.monotonic() < deadline:
        workers = psutil.Process(parent.pid).children()
        time.sleep(0.05)
    time.sleep(1)  # one is idle by now
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    for process in alive:
        process.kill()
    assert (len(gone), len(alive)) == (2, 0)
