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

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "data_pipeline", "launch", "model", "pretrain")
LONGEST_RENDEZVOUS = 600.0  # seconds
SHOWN_DIFFERENCES = 5
Facts = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """A process of the run, as the others know it."""

    rank: int
    host: str
    address: str
    machine: str  # whose process numbers are its own: host, boot and namespace
    pid: int
    started: int  # clock ticks since the machine's boot; pid and start together name a process for ever
    device: str

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, {self.address}, pid {self.pid}, {self.device})"

    def state(self) -> str | None:
        """The letter of /proc for what the process does ("T": it is stopped); None if it has ended. On its own machine only."""
        state, started = process_state(self.pid)
        return state if started == self.started and state not in ("Z", "X") else None


@dataclass(frozen=True)
class Rendezvous:
    """What this rank knows of the others once all have arrived."""

    place: Place
    size: int
    first: Place  # rank 0
    mates: tuple[Place, ...]  # the other ranks on this machine
    address: str  # of the store
    hosts_store: bool  # rank 0 does, not the launcher
    store: dist.Store
    connect: Callable[[], dist.Store]  # another connection to it, for another thread


@contextmanager
def open_layout(layout: Layout, timeout_minutes: float = 30) -> Iterator[Layout]:
    """`wait_for_ranks`, without facts to compare, then `layout.opened`."""
    rendezvous = wait_for_ranks(layout, {}, timeout_minutes)
    with layout.opened(rendezvous.store, group_timeout(timeout_minutes)):
        yield layout


def group_timeout(timeout_minutes: float) -> timedelta:
    """Of a single operation: long enough for the watchdog to speak first, who counts from the last sign of progress."""
    return timedelta(minutes=2 * timeout_minutes + 1)


def extend_timeouts(timeout_minutes: float) -> None:
    """Give every group made so far `group_timeout`: libraries make theirs with 10 or 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(group_timeout(timeout_minutes), group)


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


def wait_for_ranks(layout: Layout, facts: Facts, timeout_minutes: float) -> Rendezvous:
    """Wait until all ranks have come, ten minutes at most, and compare their `facts`.

    UserError on every rank if some do not come, if their facts differ, or if the address does not answer; on each machine
    only one rank raises it, the others end quietly with status 1.
    """
    if layout.world_size == 1:
        place = _own_place(layout, "127.0.0.1")
        return Rendezvous(place, 1, place, (), "", False, dist.HashStore(), dist.HashStore)
    seconds = min(60 * timeout_minutes, LONGEST_RENDEZVOUS)
    deadline = time.monotonic() + seconds
    host, port = _master()
    hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent does
    server = _host(host, port) if hosts_store and layout.rank == 0 else None
    place = _own_place(layout, _reach(layout, host, port, deadline))
    # A launcher that restarts the ranks may keep the store, and with it what the last attempt has written.
    prefix = f"try{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}of{layout.world_size}"

    def connect() -> dist.Store:
        return dist.PrefixStore(prefix, dist.TCPStore(host, port, timeout=timedelta(minutes=5), wait_for_workers=False))

    try:
        store = connect() if server is None else dist.PrefixStore(prefix, server)
        first, mates = _compare(store, place, layout.world_size, facts, deadline, seconds, f"{host}:{port}")
    except dist.DistError as error:
        raise UserError(f"{place}: the connection to {host}:{port} broke while the ranks met ({_line(error)})") from None
    return Rendezvous(place, layout.world_size, first, mates, f"{host}:{port}", hosts_store, store, connect)


def _master() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"MASTER_ADDR = {host!r}, MASTER_PORT = {port!r}: with WORLD_SIZE above 1 they must name rank 0's machine and a "
            "free port there; deepspeed and torchrun set them"
        )
    return host, int(port)


def _host(host: str, port: int) -> dist.Store:
    try:
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        why = "in use" if "EADDRINUSE" in str(error) else f"cannot be opened ({_line(error)})"
        raise UserError(f"MASTER_PORT = {port}: {why} on {socket.gethostname()}, where rank 0 runs; choose another") from None


def _reach(layout: Layout, host: str, port: int, deadline: float) -> str:
    """Wait until `host:port` answers; this machine's address on the way there."""
    started = time.monotonic()
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                if int(os.environ.get("LOCAL_RANK", "0")) > 0:
                    _leave_quietly(8)  # the first rank on this machine says so
                raise UserError(
                    f"rank {layout.rank} (host {socket.gethostname()}): MASTER_ADDR:MASTER_PORT = {host}:{port} has not "
                    f"answered for {time.monotonic() - started:.0f} s ({error.strerror or error}): is rank 0 running there, "
                    "and can this machine reach it?"
                ) from None
        time.sleep(0.3)


def _own_place(layout: Layout, address: str) -> Place:
    host = socket.gethostname()
    boot, namespace = "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"
    machine = [host]
    with suppress(OSError):
        machine += [Path(boot).read_text().strip(), os.readlink(namespace)]
    return Place(layout.rank, host, address, " ".join(machine), os.getpid(), process_state(os.getpid())[1], str(layout.device))


def process_state(pid: int) -> tuple[str, int]:
    """State and start of a process of this machine; ("X", 0) if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[19])


def _compare(
    store: dist.Store, place: Place, size: int, facts: Facts, deadline: float, seconds: float, address: str
) -> tuple[Place, tuple[Place, ...]]:
    """Say that this rank is there and wait for rank 0's verdict; rank 0 and the other ranks on this machine."""
    own = json.dumps([asdict(place), dict(facts)])
    found = store.compare_set(f"rank/{place.rank}", "", own).decode()
    if found != own:
        other = Place(**json.loads(found)[0])
        raise UserError(f"{address}: {other} is there already; another run uses MASTER_ADDR:MASTER_PORT, or RANK is set twice")
    store.set(f"beat/{place.rank}", "")
    store.add("arrived", 1)
    if place.rank == 0:
        while store.add("arrived", 0) < size and time.monotonic() < deadline:
            time.sleep(0.05)
        _judge(store, size, seconds, address)
    else:
        while not store.check(["verdict"]):
            if time.monotonic() > deadline + 5:
                _judge(store, size, seconds, address)
            time.sleep(0.1)
    verdict = json.loads(store.get("verdict"))
    key = f"machine/{place.machine}"  # absent for who comes after the verdict
    on_machine = [Place(**fields) for fields in json.loads(store.get(key))] if store.check([key]) else [place]
    store.add("read", 1)
    if verdict["fault"] is None:
        return Place(**verdict["first"]), tuple(other for other in on_machine if other.rank != place.rank)
    if place.rank != min(other.rank for other in on_machine):
        _leave_quietly(4)
    until = time.monotonic() + 2
    while place.rank == 0 and store.add("read", 0) < verdict["arrived"] and time.monotonic() < until:
        time.sleep(0.05)  # it may host the store
    raise UserError(verdict["fault"])


def _judge(store: dist.Store, size: int, seconds: float, address: str) -> None:
    """Publish one verdict for all: who is missing, or what differs. If another rank has done so, that one's stands."""
    here = list(range(size))
    fault = None
    if store.add("arrived", 0) < size:
        here = [rank for rank in here if store.check([f"rank/{rank}"])]
        missing = sorted(set(range(size)) - set(here))
    arrivals = [(Place(**place), found) for place, found in map(json.loads, store.multi_get([f"rank/{r}" for r in here]))]
    if len(here) < size:
        fault = (
            f"{ranks_text(missing)} of {size} did not come to {address} within {seconds:.0f} s; "
            f"{_side([place for place, _ in arrivals])} did: were all nodes started, with the same MASTER_ADDR:MASTER_PORT?"
        )
    fault = fault or differences(arrivals)
    machines: dict[str, list[dict[str, Any]]] = {}
    for place, _ in arrivals:
        machines.setdefault(place.machine, []).append(asdict(place))
    for machine, places in machines.items():
        store.set(f"machine/{machine}", json.dumps(places))
    store.set("end", "")
    verdict = {"fault": fault, "arrived": len(here), "first": asdict(arrivals[0][0])}
    store.compare_set("verdict", "", json.dumps(verdict))


def differences(arrivals: Sequence[tuple[Place, Facts]]) -> str | None:
    """What is not the same on all ranks, with the ranks and hosts of each value; None if all is."""
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
    hosts = list(dict.fromkeys(place.host for place in places))
    more = f", … {len(hosts)} hosts" if len(hosts) > 4 else ""
    return f"{ranks_text(place.rank for place in places)} ({', '.join(hosts[:4])}{more})"


def _leave_quietly(seconds: float) -> None:
    """End with status 1 once the rank that speaks has had time to: launchers end all with the first."""
    time.sleep(seconds)
    raise SystemExit(1)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
