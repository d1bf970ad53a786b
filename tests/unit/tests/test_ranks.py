"""Forked processes behave as new ones, and what goes wrong in one reaches the test."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.helpers import joined, run, run_ranks, wait_until
from tests.ranks import RankError, Ranks


def add_up(rank: int, ranks: int, folder: Path) -> None:
    with joined(rank, ranks, folder):
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
    (folder / str(rank)).write_text(str(total.item()))


def test_ranks_make_a_group_and_compute(tmp_path: Path) -> None:
    run_ranks(add_up, 3, 3, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["3.0"] * 3


def find_out(folder: Path) -> None:
    server = psutil.Process(os.getppid())
    facts = (
        os.environ.get("OF_THIS_TEST"),
        "deepspeed" in sys.modules and "megatron.core" in sys.modules,
        server.num_threads(),
        torch.get_num_threads(),
        dist.is_initialized(),
        torch.cuda.is_available(),
        os.getsid(0) == os.getpid(),
    )
    (folder / "facts").write_text(str(facts))


def test_the_server_has_imported_everything_and_started_nothing(tmp_path: Path) -> None:
    for value in ("first", "second"):
        with Ranks(find_out, [{**os.environ, "OF_THIS_TEST": value}], [(tmp_path,)]) as ranks:
            assert ranks.wait(60) is None, ranks.report()
        assert (tmp_path / "facts").read_text() == str((value, True, 1, 1, False, False, True))


def test_a_rank_has_the_variables_of_its_test(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OF_THIS_TEST", "yes")
    monkeypatch.delenv("HOME")
    run_ranks(lookup, 1)
    output = capfd.readouterr().out
    assert output == "yes None 1 '' test_a_rank_has_the_variables_of_its_test (call)\n"


def lookup(rank: int) -> None:
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2]
    names = (os.environ.get(name) for name in ("OF_THIS_TEST", "HOME", "OMP_NUM_THREADS"))
    print(*names, repr(os.environ["CUDA_VISIBLE_DEVICES"]), test)


def write_everywhere(rank: int) -> None:
    print(f"printed by {rank}")
    os.write(2, f"written by {rank}\n".encode())
    subprocess.run(["echo", f"from a child of {rank}"], check=True)


def test_output_reaches_the_test(capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(write_everywhere, 2)
    captured = capsys.readouterr()
    assert sorted(captured.out.splitlines()) == sorted(
        f"{what} {rank}" for rank in (0, 1) for what in ("from a child of", "printed by")
    )
    assert captured.err == "written by 0\nwritten by 1\n"


def break_down(rank: int, how: str, folder: Path) -> None:
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    print("before the end", flush=True)
    if rank == 0:
        child = subprocess.Popen(["sleep", "1000"])
        (folder / "child").write_text(str(child.pid))
        time.sleep(1000)
    while not (folder / "child").exists():
        time.sleep(0.01)
    if how == "raises":
        raise ZeroDivisionError("so it is")
    if how == "exits":
        sys.exit(1)
    if how == "exits with words":
        sys.exit("no more")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raises", ["rank 1 ended with status 1", "in break_down", "ZeroDivisionError: so it is"]),
        ("exits", ["rank 1 ended with status 1"]),
        ("exits with words", ["rank 1 ended with status 1", "no more"]),
        ("dies", ["rank 1 was ended by SIGKILL"]),
    ],
)
def test_what_fails_in_one_rank_ends_all_and_is_raised(tmp_path: Path, how: str, expected: list[str]) -> None:
    with pytest.raises(RankError) as raised:
        run_ranks(break_down, 2, how, tmp_path, seconds=60)
    for text in (*expected, "rank 0, still runs", "before the end"):
        assert text in str(raised.value)
    pids = [int((tmp_path / name).read_text()) for name in ("pid0", "pid1", "child")]
    wait_until(lambda: not any(map(lives, pids)), seconds=10)


def lives(pid: int) -> bool:
    """Not so a process that ended and whose parent has not asked how."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stand_still(rank: int) -> None:
    print("before the sleep", flush=True)
    while rank == 1:
        time.sleep(0.1)


def test_a_hang_ends_and_says_where_it_stood() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="ranks hang after 2 s") as raised:
        run_ranks(stand_still, 2, seconds=2)
    assert time.monotonic() - began < 30
    assert "rank 0, ended with status 0\nbefore the sleep" in str(raised.value)
    assert "in stand_still" in str(raised.value)


class Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return operator.truediv, (1, 0)


def test_what_a_rank_cannot_unpickle_is_raised() -> None:
    with pytest.raises(RankError, match="ZeroDivisionError"):
        run_ranks(print, 1, Unreadable())


SCRIPT = """
import os, sys
if __name__ == "__main__":
    print(sys.argv[1:], *(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")), os.getcwd())
    if os.environ.get("RANK") == "1":
        sys.exit(3)
"""


def test_a_script_runs_as_by_a_launcher(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    results = [run([str(script), "--some=value"], "forked"), run([str(script), "--some=value"], "python")]
    assert results[0].stdout == results[1].stdout
    assert [(result.returncode, result.stderr) for result in results] == [(0, ""), (0, "")]
    result = run([str(script)], "forked", 2)
    assert result.returncode == 3
    assert [line.split()[1:5] for line in result.stdout.splitlines()] == [
        [str(rank), str(rank), "2", "127.0.0.1"] for rank in (0, 1)
    ]
