"""A few cases of tests/soak, always the same; `make soak` draws as many as you like."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.__main__ import prepared
from tests.soak.draw import pair
from tests.soak.kills import Kills
from tests.soak.pairs import check_pair
from tests.soak.worlds import Worlds

PAIRS = 9, range(1, 5)  # seed and numbers
KILLS = "121, kill"  # in a commit, in resuming, in a save


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    with Worlds() as worlds:
        yield worlds


@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", PAIRS[1])
def test_a_run_resumes_on_any_layout_as_if_it_had_kept_its_own(tmp_path: Path, data: Path, worlds: Worlds, number: int) -> None:
    case = pair(PAIRS[0], number)
    assert check_pair(case, worlds, tmp_path / "pair", data, parts=3).faults == [], case


@pytest.mark.timeout(400)
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path: Path, data: Path) -> None:
    found = Kills("ZeRO 2", tmp_path, data).case(random.Random(KILLS), "killed", "forked", most=3)
    assert found.faults == [], (found.kills, found.output)
    assert [kill.partition(" ")[0] for kill in found.kills] == ["commit", "resume", "save"]
