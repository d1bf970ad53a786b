"""What ends a run: silence, standstill, a process that is gone; and what does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from configs.errors import UserError
from configs.schema import ParallelConfig
from pretrain.distributed.collectives import OtherRankError
from pretrain.distributed.pace import STANDARD, Pace
from pretrain.distributed.rendezvous import Place, Rendezvous, process_state
from pretrain.distributed.signs import Sign, broke, standings, where_main_thread_is, where_raised
from pretrain.distributed.watchdog import Watchdog
from pretrain.loop.interruption import Interruption
from tests.helpers import free_port, wait_until

SIGN = Sign(1, 7, 0.0, "pretrain/loop/trainer.py:1 run")


@pytest.fixture
def store() -> dist.Store:
    port = free_port()
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def watchdog(
    store: dist.Store, rank: int, size: int, mates: tuple[Place, ...] = (), pace: Pace = STANDARD, of_machine: int = 1
) -> Watchdog:
    """One that runs no threads: its checks are called by hand. All other ranks have given a sign just now.

    `of_machine`: ranks of each machine; `mates` are then those of this one.
    """
    places = [Place(number, f"node{number}", "10.0.0.1", f"m{number}", 1, 1, "cpu") for number in range(size)]
    if of_machine > 1:
        mates = tuple(place for place in places if place.rank // of_machine == rank // of_machine and place.rank != rank)
    leaders = tuple(range(0, size, of_machine)) if rank == 0 else ()
    for place in places:
        store.set(f"rank/{place.rank}", json.dumps([asdict(place), {}]))
        store.set(f"beat/{place.rank}", json.dumps(asdict(SIGN)))
    rendezvous = Rendezvous(places[rank], size, places[0], mates, leaders, "host:1", False, store, lambda: store)
    made = Watchdog(rendezvous, ParallelConfig(lost_after_seconds=30, timeout_minutes=10), pace)
    made.signs = dict.fromkeys(made.watched, SIGN)
    return made


def test_a_rank_watches_few_others_and_each_is_watched(store: dist.Store) -> None:
    size = 9
    watched = [watchdog(store, rank, size).watched for rank in range(size)]
    assert watched[0] == list(range(1, size))
    assert watched[5] == [0, 6, 7]
    assert watched[7] == [0, 8]
    for rank in range(size):
        assert sum(rank in others for others in watched) >= 2


def test_no_rank_reads_a_sign_of_every_rank(store: dist.Store) -> None:
    """1,024 ranks on 128 machines: the busiest rank reads one of each machine and of its own machine's ranks."""
    read = {rank: watchdog(store, rank, 1024, of_machine=8).watched for rank in (0, 1, 8, 12, 1023)}
    assert read[0] == sorted({*range(1, 8), *range(8, 1024, 8)})
    assert read[1] == [0, 2, 3]
    assert read[8] == [0, *range(9, 16)]
    assert read[12] == [0, 13, 14]
    assert read[1023] == [0, 1]


def test_progress_of_one_rank_reaches_rank_0_through_the_first_of_its_machine(store: dist.Store) -> None:
    """Four ranks on two machines; nothing moves but on rank 3."""
    still = time.monotonic() - 700
    for moving, stalls in ((True, False), (False, True)):
        made = {rank: watchdog(store, rank, 4, of_machine=2) for rank in range(4)}
        for rank, one in made.items():
            one.moved_at = still if rank != 3 or not moving else time.monotonic()
            one.signs = dict.fromkeys(one.watched, replace(SIGN, idle=700.0))
        made[2].signs[3] = made[3]._own_sign()
        made[0].signs[2] = made[2]._own_sign()
        assert (made[0]._stalled(time.monotonic()) is not None) == stalls


def test_the_rank_that_failed_speaks_before_those_it_failed_for(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    try:
        try:
            raise OtherRankError("rank 1 failed: KeyError: 'x'")
        except UserError as fault:
            raise UserError(f"the checkpoint could not be saved ({fault})") from None
    except UserError as fault:
        in_other_words = fault
    first, second = watchdog(store, 0, 2), watchdog(store, 1, 2)
    expected = {in_other_words: True, OtherRankError("rank 1 failed"): True, UserError("all find it"): False}
    for error, waits in expected.items():
        assert first._request(error)[0].text == str(error)
        assert waited == waits * [2 * first.period]
        waited.clear()
    trace = second._request(KeyError("x"))[1]
    assert not waited
    assert "KeyError: 'x'" in trace


def test_silence_for_too_long_is_loss_and_for_less_is_not(store: dist.Store) -> None:
    made = watchdog(store, 5, 9)
    now = max(made.seen.values())
    assert made._silent(store, now + 29) is None
    end = made._silent(store, now + 31)
    assert end is not None
    made.seen[0] = made.seen[6] = now + 31
    end = made._silent(store, now + 31)
    assert end is not None
    assert (end.lost, end.speaker, end.status) == (7, 5, 1)
    assert end.text.startswith("rank 7 (node node7, 10.0.0.1, pid 1, cpu) has not been heard of for 31 s; it was after step 7")
    made.signs[7] = replace(SIGN, left=True)
    assert made._silent(store, now + 31) is None


def test_a_broken_connection_shortens_the_wait(store: dist.Store) -> None:
    made = watchdog(store, 0, 3)
    now = max(made.seen.values())
    assert made._silent(store, now + 11) is None
    made.signs[1], made.seen[1] = replace(SIGN, broken=True), now + 11
    end = made._silent(store, now + 11)
    assert end is not None
    assert end.lost == 2


def test_a_standstill_is_one_of_all_ranks(store: dist.Store) -> None:
    made = watchdog(store, 0, 3)
    now = made.moved_at = max(made.seen.values())
    made.signs = {rank: replace(SIGN, idle=601.0) for rank in (1, 2)}
    assert made._stalled(now) is None  # this rank has just moved
    made.moved_at -= 601
    assert made._stalled(now) is not None
    made.signs[2] = SIGN
    assert made._stalled(now) is None
    other = watchdog(store, 1, 3)
    other.moved_at -= 10_000
    assert other._stalled(now) is None


def test_a_process_that_ended_is_gone_at_once_unless_it_had_left(store: dist.Store, sleeper: subprocess.Popen[bytes]) -> None:
    mate = Place(1, "here", "127.0.0.1", "m0", sleeper.pid, process_state(sleeper.pid)[1], "cpu")
    made, leaver = (watchdog(store, 0, 2, (mate,)) for _ in range(2))
    assert made._gone(store) is None
    sleeper.kill()
    wait_until(lambda: mate.state() is None)
    end = made._gone(store)
    assert end is not None
    assert end.text == f"{mate} is gone (killed, or crashed); it was {SIGN}"
    store.set("beat/1", json.dumps(asdict(replace(SIGN, left=True))))
    assert leaver._gone(store) is None


def test_stopped_processes_are_killed_and_no_other_that_got_their_number(
    store: dist.Store, sleeper: subprocess.Popen[bytes]
) -> None:
    mate = Place(1, "here", "127.0.0.1", "m0", sleeper.pid, process_state(sleeper.pid)[1], "cpu")
    wait_until(lambda: mate.state() == "S")  # it has started
    watchdog(store, 0, 2, (mate,))._kill(lost=None)
    assert mate.state() == "S"
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: mate.state() == "T")
    watchdog(store, 0, 2, (replace(mate, started=mate.started + 1),))._kill(lost=1)
    assert mate.state() == "T"
    watchdog(store, 0, 2, (mate,))._kill(lost=None)
    assert sleeper.wait(timeout=10) == -signal.SIGKILL


def test_a_long_call_that_frees_the_interpreter_does_not_stop_the_signs(store: dist.Store) -> None:
    """Nor does a watchdog of a run that ends well outlive it."""
    made = watchdog(store, 0, 2, pace=Pace(beat=0.1, leave=0.2))
    store.set("end", "")
    before = threading.active_count()
    with made:
        time.sleep(0.5)  # as in a collective
        number = json.loads(store.get("beat/0"))["number"]
    assert number >= 2
    wait_until(lambda: threading.active_count() == before, seconds=5)
    assert json.loads(store.get("beat/0"))["left"]


def test_one_rank_speaks_and_the_others_end_quietly(
    store: dist.Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.distributed.watchdog.end_process", sys.exit)  # this process goes on
    store.set("end", "")
    pace = Pace(follow=0.01)
    for rank in (2, 0, 1):
        made = watchdog(store, rank, 3, pace=pace)
        made.rendezvous = replace(made.rendezvous, place=replace(made.rendezvous.place, machine="the same"))
        with pytest.raises(SystemExit, match="1"):
            made._declare(store, made._end(f"rank {rank} found it", lost=1, report=True))
    errors = capfd.readouterr().err
    assert errors == "error: rank 2 found it\n  ranks 0, 2 are after step 7 in pretrain/loop/trainer.py:1 run\n"
    elsewhere = watchdog(store, 1, 3, pace=pace)
    with pytest.raises(SystemExit, match="1"):
        elsewhere._tick(store)
    assert capfd.readouterr().err == "stopped: rank 2 found it\n"  # on another machine, whose log may be another


def test_ranks_that_stand_in_one_place_share_a_line() -> None:
    signs = dict.fromkeys(range(1000), SIGN) | {17: replace(SIGN, where="data_pipeline/read/loader.py:2 step")}
    assert standings(signs).splitlines() == [
        "  ranks 0–16, 18–999 are after step 7 in pretrain/loop/trainer.py:1 run",
        "  rank 17 is after step 7 in data_pipeline/read/loader.py:2 step",
    ]
    many = standings({rank: replace(SIGN, step=rank) for rank in range(100)}).splitlines()
    assert len(many) == 17
    assert many[0] == "  rank 0 is before its first step in pretrain/loop/trainer.py:1 run"
    assert many[-1] == "  and 84 other places"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("reset"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("gloo"), False),
    ],
)
def test_which_errors_tell_of_another_rank(error: Exception, expected: bool) -> None:
    assert broke(error) is expected


def test_places_are_named_by_the_innermost_line_of_this_project() -> None:
    assert where_main_thread_is() == "code that is not of this project"  # a test is not
    with pytest.raises(ValueError, match="null byte") as raised:
        process_state("\0")  # type: ignore[arg-type]
    place = where_raised(raised.tb)
    assert place.startswith("pretrain/distributed/rendezvous.py:")
    assert place.endswith(" process_state")
    with pytest.raises(ValueError, match="Expecting value") as raised_there:
        Sign.read(b'{"number": ')
    assert where_raised(raised_there.tb) == "code that is not of this project"  # the watchdog's own is not where a rank stands


def test_the_first_signal_counts_and_only_a_later_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal == signal.SIGTERM
        interruption.came_at -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
