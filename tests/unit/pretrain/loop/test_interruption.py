"""Signals while a run is in its `with` block, and its handlers afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pretrain.loop import interruption
from pretrain.loop.interruption import STOP_SIGNALS, Interruption


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of the test process come back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted(number: int) -> None:
    with Interruption() as interrupted:
        assert interrupted.signal is None
        kill(number)
        assert interrupted.signal == number


def test_the_first_signal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes Ctrl-C on as SIGTERM, and a terminal's key press may come twice within a second."""
    now = [50.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with Interruption() as interrupted:
        for seconds, number in ((0, signal.SIGINT), (0.5, signal.SIGTERM), (0.99, signal.SIGINT), (100, signal.SIGTERM)):
            now[0] = 50 + seconds
            kill(number)
            assert interrupted.signal == signal.SIGINT


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_ctrl_c_a_second_after_a_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    now = [50.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with Interruption():
        kill(first)
        now[0] = 51.01
        with pytest.raises(KeyboardInterrupt):
            kill(signal.SIGINT)


def test_handlers_come_back_even_after_an_error() -> None:
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append("SIGTERM"))
    with pytest.raises(ZeroDivisionError), Interruption() as interrupted:
        raise ZeroDivisionError
    kill(signal.SIGTERM)
    assert (came, interrupted.signal) == (["SIGTERM"], None)
