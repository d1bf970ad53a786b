"""Launcher variables are sound, or one line says which is not."""

import pytest

from configs.errors import UserError
from configs.launcher import check_launcher, rank, world_size

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process() -> None:
    check_launcher()
    assert (rank(), world_size()) == (0, 1)


def test_what_launchers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in zip(NAMES, ("8", "7", "3", "4", "29500"), strict=True):
        monkeypatch.setenv(name, text)
    check_launcher()
    assert (rank(), world_size()) == (7, 8)


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("WORLD_SIZE", "", "WORLD_SIZE=: "),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two: "),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0: "),
        ("WORLD_SIZE", "²", "WORLD_SIZE=²: "),
        ("RANK", "-1", "RANK=-1: "),
        ("RANK", "1", "RANK=1: the environment must have a rank below WORLD_SIZE (1)"),
        ("LOCAL_RANK", "1.0", "LOCAL_RANK=1.0: "),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999: the environment must have a whole number from 1 to 65535"),
        ("MASTER_PORT", "9" * 9999, "(9,999 characters): "),
    ],
)
def test_what_no_launcher_sets(monkeypatch: pytest.MonkeyPatch, name: str, text: str, shown: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(UserError) as raised:
        check_launcher()
    assert shown in str(raised.value)
    assert len(str(raised.value)) < 250
