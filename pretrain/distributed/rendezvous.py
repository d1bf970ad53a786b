"""Rendezvous of the ranks of a run: the store at the launcher's address, who has arrived, whether all run the same thing."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.load import flat_fields
from configs.schema import Config
from pretrain.distributed.layout import Layout
from pretrain.distributed.pace import STANDARD, Pace

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "data_pipeline", "launch", "model", "pretrain")
SHOWN_DIFFERENCES = 5
Facts = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """A process of the run, as the other ranks know it."""

    rank: int
    node: str
    address: str
    machine: str  # has its own process numbers: host name, boot and namespace
    pid: int
    started: int  # clock ticks since the machine's boot; pid and start together name a process for ever
    device: str

    def __str__(self) -> str:
        return f"rank {self.rank} (node {self.node}, {self.address}, pid {self.pid}, {self.device})"

    def state(self) -> str | None:
        """The state letter in /proc ("T": stopped); None if the process has ended. Only on its own machine."""
        state, started = process_state(self.pid)
        return state if started == self.started and state not in ("Z", "X") else None


@dataclass(frozen=True)
class Rendezvous:
    """What this rank knows of the others once all have arrived."""

    place: Place
    size: int
    first: Place  # rank 0
    mates: tuple[Place, ...]  # the other ranks on this machine
    leaders: tuple[int, ...]  # on rank 0 the first rank of each machine, else none
    address: str  # of the store
    serves_store: bool  # rank 0 does, not the launcher
    store: dist.Store
    connect: Callable[[], dist.Store]  # another connection to it, for another thread


@contextmanager
def open_layout(layout: Layout, timeout_minutes: float = 30) -> Iterator[Layout]:
    """`wait_for_ranks`, without facts to compare, then `layout.opened`."""
    rendezvous = wait_for_ranks(layout, {}, timeout_minutes)
    with layout.opened(rendezvous.store, group_timeout(timeout_minutes)):
        yield layout


def group_timeout(timeout_minutes: float) -> timedelta:
    """The timeout of one collective: long enough for the watchdog, which counts from the last progress, to report first."""
    return timedelta(minutes=2 * timeout_minutes + 1)


def facts(config: Config, resume: str, device: torch.device) -> Facts:
    """What must be the same on every rank."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = {"device": kind, "python": platform.python_version()}
    found |= {package: version(package) for package in ("torch", "deepspeed", "megatron-core")}
    found |= {name: repr(value) for name, value in flat_fields(config)}
    return found | {"--resume": repr(resume)} | source_hashes(ROOT)


def source_hashes(root: Path) -> dict[str, str]:
    """Start of the SHA-256 of every source file of the project, by its path."""
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def wait_for_ranks(layout: Layout, facts: Facts, timeout_minutes: float, pace: Pace = STANDARD) -> Rendezvous:
    """Wait until all ranks have arrived, at most `timeout_minutes` and `pace.rendezvous`, and compare their `facts`.

    If some do not arrive, if facts differ, or if the address does not answer, one rank of each machine raises UserError, and
    the others end quietly with status 1.
    """
    if layout.world_size == 1:
        place = _own_place(layout, "127.0.0.1")
        return Rendezvous(place, 1, place, (), (0,), "", False, dist.HashStore(), dist.HashStore)
    seconds = min(60 * timeout_minutes, pace.rendezvous)
    deadline = time.monotonic() + seconds
    host, port = _master()
    serves_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent does
    server = _serve(host, port) if serves_store and layout.rank == 0 else None
    place = _own_place(layout, _reach(layout, host, port, deadline, pace))
    # A launcher that restarts the ranks may keep the store, with what the last attempt wrote.
    prefix = f"try{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}of{layout.world_size}"

    def connect() -> dist.Store:
        return dist.PrefixStore(prefix, dist.TCPStore(host, port, timeout=timedelta(minutes=5), wait_for_workers=False))

    try:
        store = connect() if server is None else dist.PrefixStore(prefix, server)
        roll_call = _RollCall(store, place, layout.world_size, f"{host}:{port}", seconds, deadline, pace)
        first, mates, leaders = roll_call.answer(facts)
    except dist.DistError as error:
        raise UserError(f"{place}: the connection to {host}:{port} broke during the rendezvous ({_line(error)})") from None
    return Rendezvous(place, layout.world_size, first, mates, leaders, f"{host}:{port}", serves_store, store, connect)


def _master() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"MASTER_ADDR = {host!r}, MASTER_PORT = {port!r}: with WORLD_SIZE above 1 they must name rank 0's machine and a "
            "free port there; deepspeed and torchrun set them"
        )
    return host, int(port)


def _serve(host: str, port: int) -> dist.Store:
    try:
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        why = "in use" if "EADDRINUSE" in str(error) else f"cannot be opened ({_line(error)})"
        raise UserError(f"MASTER_PORT = {port}: {why} on {socket.gethostname()}, where rank 0 runs; choose another") from None


def _reach(layout: Layout, host: str, port: int, deadline: float, pace: Pace) -> str:
    """Wait until `host:port` answers; this machine's address on the way there."""
    started = time.monotonic()
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                if int(os.environ.get("LOCAL_RANK", "0")) > 0:
                    _leave_quietly(2 * pace.report)  # the first rank on this machine says so
                raise UserError(
                    f"rank {layout.rank} (node {socket.gethostname()}): MASTER_ADDR:MASTER_PORT = {host}:{port} has not "
                    f"answered for {time.monotonic() - started:.0f} s ({error.strerror or error}): is rank 0 running there, "
                    "and can this machine reach it?"
                ) from None
        time.sleep(pace.retry)


def _own_place(layout: Layout, address: str) -> Place:
    node = socket.gethostname()
    boot, namespace = "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"
    machine = [node]
    with suppress(OSError):
        machine += [Path(boot).read_text().strip(), os.readlink(namespace)]
    return Place(layout.rank, node, address, " ".join(machine), os.getpid(), process_state(os.getpid())[1], str(layout.device))


def process_state(pid: int) -> tuple[str, int]:
    """State and start of a process of this machine; ("X", 0) if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class _RollCall:
    """How the ranks announce themselves in the store and rank 0 publishes one verdict for all."""

    store: dist.Store
    place: Place
    size: int
    address: str
    seconds: float  # from the start to the deadline
    deadline: float
    pace: Pace

    def answer(self, facts: Facts) -> tuple[Place, tuple[Place, ...], tuple[int, ...]]:
        """Announce this rank and wait for the verdict. Returns rank 0, the other ranks on this machine, and the leaders."""
        self._announce(facts)
        if self.place.rank == 0:
            while self.store.add("arrived", 0) < self.size and time.monotonic() < self.deadline:
                time.sleep(self.pace.poll / 2)
            self._judge()
        else:
            while not self.store.check(["verdict"]):
                if time.monotonic() > self.deadline + self.pace.verdict:
                    self._judge()
                time.sleep(self.pace.poll)
        verdict = json.loads(self.store.get("verdict"))
        key = f"machine/{self.place.machine}"  # absent for a rank that arrives after the verdict
        known = json.loads(self.store.get(key)) if self.store.check([key]) else [asdict(self.place)]
        on_machine = [Place(**fields) for fields in known]
        self.store.add("read", 1)
        if verdict["fault"] is not None:
            self._fail(verdict, on_machine)
        mates = tuple(other for other in on_machine if other.rank != self.place.rank)
        leaders = json.loads(self.store.get("leaders")) if self.place.rank == 0 else []
        return Place(**verdict["first"]), mates, tuple(leaders)

    def _announce(self, facts: Facts) -> None:
        own = json.dumps([asdict(self.place), dict(facts)])
        found = self.store.compare_set(f"rank/{self.place.rank}", "", own).decode()
        if found != own:
            other = Place(**json.loads(found)[0])
            raise UserError(
                f"{self.address}: {other} is already registered; another run uses MASTER_ADDR:MASTER_PORT, or RANK is set twice"
            )
        self.store.set(f"beat/{self.place.rank}", "")
        self.store.add("arrived", 1)

    def _fail(self, verdict: dict[str, Any], on_machine: Sequence[Place]) -> None:
        """End with the verdict's fault; one rank of each machine reports it."""
        if self.place.rank != min(other.rank for other in on_machine):
            _leave_quietly(self.pace.report)
        until = time.monotonic() + self.pace.report / 2
        while self.place.rank == 0 and self.store.add("read", 0) < verdict["arrived"] and time.monotonic() < until:
            time.sleep(self.pace.poll / 2)  # rank 0 may serve the store
        raise UserError(verdict["fault"])

    def _judge(self) -> None:
        """Publish one verdict for all: who is missing, or what differs. A verdict that another rank has published stands."""
        store, here = self.store, list(range(self.size))
        fault = None
        if store.add("arrived", 0) < self.size:
            here = [rank for rank in here if store.check([f"rank/{rank}"])]
            missing = sorted(set(range(self.size)) - set(here))
        arrivals = [(Place(**place), found) for place, found in map(json.loads, store.multi_get([f"rank/{r}" for r in here]))]
        if len(here) < self.size:
            fault = (
                f"{ranks_text(missing)} of {self.size} did not reach {self.address} within {self.seconds:.0f} s; "
                f"{_side([place for place, _ in arrivals])} did: were all nodes started, with the same MASTER_ADDR:MASTER_PORT?"
            )
        fault = fault or differences(arrivals)
        machines: dict[str, list[dict[str, Any]]] = {}
        for place, _ in arrivals:
            machines.setdefault(place.machine, []).append(asdict(place))
        for machine, places in machines.items():
            store.set(f"machine/{machine}", json.dumps(places))
        store.set("leaders", json.dumps([min(place["rank"] for place in places) for places in machines.values()]))
        store.set("end", "")
        verdict = {"fault": fault, "arrived": len(here), "first": asdict(arrivals[0][0])}
        store.compare_set("verdict", "", json.dumps(verdict))


def differences(arrivals: Sequence[tuple[Place, Facts]]) -> str | None:
    """What differs between ranks, with the ranks and nodes of each value; None if nothing does."""
    lines = []
    for name in dict.fromkeys(name for _, found in arrivals for name in found):
        sides: dict[str, list[Place]] = {}
        for place, found in arrivals:
            sides.setdefault(found.get(name, "absent"), []).append(place)
        if len(sides) > 1:
            lines.append(f"  {name}: " + "; ".join(f"{value} on {_side(places)}" for value, places in sides.items()))
    if not lines:
        return None
    rest = [f"  and {len(lines) - SHOWN_DIFFERENCES} more"] if len(lines) > SHOWN_DIFFERENCES else []
    return "\n".join(["the ranks do not run the same thing", *lines[:SHOWN_DIFFERENCES], *rest])


def ranks_text(ranks: Iterable[int]) -> str:
    """`ranks 0, 2–7`"""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    single = len(spans) == 1 and spans[0][0] == spans[0][1]
    text = ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in spans[:16])
    return f"{'rank' if single else 'ranks'} {text}{', …' if len(spans) > 16 else ''}"


def _side(places: Sequence[Place]) -> str:
    nodes = list(dict.fromkeys(place.node for place in places))
    more = f", … {len(nodes)} nodes" if len(nodes) > 4 else ""
    return f"{ranks_text(place.rank for place in places)} ({', '.join(nodes[:4])}{more})"


def _leave_quietly(seconds: float) -> None:
    """End with status 1 once the rank that reports has had time to do so: a launcher ends all ranks with the first one."""
    time.sleep(seconds)
    raise SystemExit(1)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
