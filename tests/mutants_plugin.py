"""The plugin of pytest that `tests/mutants.py run` loads in its copies: it tries mutants with every test, in forks of pytest.

Fixtures of several tests are made in the process that forks, so that its forks have them. A mutant that such a fixture came
past is tried with all of them made anew.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

reached_by: dict[Any, set[int]] = {}  # by fixture
outcomes: set[str] = set()  # of the parts of the test of this fork


def switch(number: int, folder: Path | None) -> None:
    """Make a mutant active (-1 for none) here and in processes started from now on, and name the folder for those passed."""
    os.environ.update({"MUTANT": str(number), "MUTANT_REACH": str(folder or "")})


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Iterator[None]:
    if fixturedef.scope == "function" or "MUTANT_FORK" in os.environ:
        return (yield)
    with TemporaryDirectory() as folder:
        switch(-1, Path(folder))
        try:
            return (yield)
        finally:
            reached_by[fixturedef] = {int(name) for name in os.listdir(folder)}
            switch(-1, None)


def pytest_runtest_logreport(report: Any) -> None:
    outcomes.add(report.outcome)


def attempt(item: Any, number: int, anew: bool, seconds: float) -> tuple[str, set[int]]:
    """Run a test in a fork with one mutant, or none: how it ends, and which mutants it came past."""
    mark = f"{os.environ['MUTANT_WORK']}/{time.monotonic()}"
    with TemporaryDirectory() as name:
        folder = Path(name)
        if (child := os.fork()) == 0:
            try:
                os.setpgid(0, 0)
                os.environ["MUTANT_FORK"] = mark
                switch(number, folder)
                if anew:
                    item.session._setupstate.teardown_exact(None)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=siblings(item))
                (folder / "outcome").write_text(next(how for how in ("failed", "skipped", "passed") if how in outcomes))
            finally:
                os._exit(0)
        deadline = time.monotonic() + seconds
        while (ended := os.waitpid(child, os.WNOHANG)[0]) == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        with suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        for path in Path("/proc").glob("[0-9]*"):  # and what left the group
            with suppress(OSError):
                if f"MUTANT_FORK={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    os.kill(int(path.name), signal.SIGKILL)
        if not ended:
            os.waitpid(child, 0)
        outcome = (folder / "outcome").read_text() if (folder / "outcome").exists() else "crashed" if ended else "hung"
        return outcome, {int(path.name) for path in folder.iterdir() if path.name != "outcome"}


def siblings(item: Any) -> Any:
    """Stands for the next test of the same module."""
    return SimpleNamespace(listchain=lambda: item.listchain()[:-1])


def make_fixtures(item: Any) -> set[int]:
    """Make the fixtures that several tests share, unless they are there; the mutants that they came past."""
    shared = [f[-1] for f in item._fixtureinfo.name2fixturedefs.values() if f[-1].scope != "function"]
    state, quietly = item.session._setupstate, (Exception, pytest.skip.Exception, pytest.fail.Exception)  # the forks will tell
    with suppress(*quietly):
        state.teardown_exact(siblings(item))  # of another file
    with suppress(*quietly):
        lasting = any(inspect.isgeneratorfunction(fixture.func) for fixture in shared)  # say, threads, which a fork has not
        if not lasting and any(fixture.cached_result is None for fixture in shared):
            item._initrequest()
            state.setup(item)
    with suppress(*quietly):
        state.teardown_exact(siblings(item))
    item._initrequest()
    return {number for fixture in shared for number in reached_by.get(fixture, ())}


def pytest_runtestloop(session: Any) -> bool:
    """Try mutants with every test: one set of parameters of each first, slow tests last; a file's tests in one worker."""
    work, until, limit, patience = json.loads(os.environ["MUTANT_OPTIONS"])
    rows, count, groups = Path(work, "rows.jsonl"), Counter[str](), defaultdict[str, list[Any]](list)
    slow: list[tuple[Any, dict[str, Any]]] = []
    session.config._tmp_path_factory.getbasetemp()
    for item in session.items:
        function = item.nodeid.partition("[")[0]
        count[function] += 1
        groups[f"{min(count[function], 2)} {item.nodeid.partition('::')[0]}"].append(item)
    for item in (item for group in sorted(groups, key=lambda name: name[0]) if claim(work, group) for item in groups[group]):
        if time.time() < until and not any(row["test"] == item.nodeid and not row.get("waits") for row in read(rows)):
            shared, start = make_fixtures(item), time.monotonic()
            outcome, own = attempt(item, -1, False, 900)
            row = {"test": item.nodeid, "outcome": outcome, "seconds": time.monotonic() - start, "past": sorted(own | shared)}
            if row["seconds"] > patience and unnoticed(row, read(rows), limit):
                slow.append((item, row))
                write(rows, row | {"waits": True, "trials": {}})
            else:
                try_mutants(item, row, rows, limit)
    for item, row in sorted(slow, key=lambda pair: pair[1]["seconds"]):
        if time.time() < until:
            try_mutants(item, row, rows, limit)
    session._setupstate.teardown_exact(None)
    return True


def read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()]


def unnoticed(row: dict[str, Any], rows: list[dict[str, Any]], limit: float) -> list[int]:
    """The mutants that a test comes past, without those that a test has noticed and those that had their time."""
    left = []
    for number in row["past"] if row["outcome"] == "passed" else []:
        tried = [other for other in rows if str(number) in other["trials"]]
        noticed = any(other["trials"][str(number)] != "passed" for other in tried)
        if not noticed and sum(other["seconds"] for other in tried) < limit:
            left.append(number)
    return left


def try_mutants(item: Any, row: dict[str, Any], rows: Path, limit: float) -> None:
    shared = make_fixtures(item)
    trials = {n: attempt(item, n, n in shared, 60 + 5 * row["seconds"])[0] for n in unnoticed(row, read(rows), limit)}
    write(rows, row | {"waits": False, "trials": trials})


def write(rows: Path, row: dict[str, Any]) -> None:
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


def claim(work: str, group: str) -> bool:
    """Whether no other worker has these tests."""
    with suppress(FileExistsError):
        Path(work, "claims", group.replace("/", "+")).touch(exist_ok=False)
        return True
    return False
