"""Training over two nodes: two network namespaces of this machine, joined by one virtual cable."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
import torch

from pretrain.checkpoints.unsharded import load_weights
from tests.helpers import BIN, ROOT, environment, metrics, numbers, train, wait_until, write_run
from tests.ranks import Ranks, run_script

FSDP = ("--backend=fsdp",)  # starts sooner than deepspeed
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# What Slurm's commands do for a job step of one task on each node.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 2
shift
for node in 0 1; do
    read -r namespace interface address <<< "$(sed -n "$((node + 1))p" {nodes})"
    SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 SLURMD_NODENAME=$address GLOO_SOCKET_IFNAME=$interface \\
        ip netns exec "$namespace" "$@" &
    tasks[node]=$!
done
status=0
for task in "${{tasks[@]}}"; do
    wait "$task" || status=$?
done
exit "$status"
"""


@dataclass
class Nodes:
    """Two namespaces with nothing but a loopback and an end of the cable; `start` runs commands in them."""

    namespaces: tuple[str, str]
    interfaces: tuple[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def connect(self) -> None:
        """Make namespaces and cable. Raises CalledProcessError where the system does not allow it."""
        for namespace in self.namespaces:
            ip("netns", "add", namespace)
        (a, b), (cable_a, cable_b) = self.namespaces, self.interfaces
        ip("link", "add", cable_a, "netns", a, "type", "veth", "peer", "name", cable_b, "netns", b)
        for namespace, interface, address in zip(self.namespaces, self.interfaces, ADDRESSES, strict=True):
            ip("-n", namespace, "address", "add", f"{address}/30", "dev", interface)
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "link", "set", interface, "up")

    def start(
        self, arguments: Sequence[str], log: Path, node: int | None = None, variables: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.Popen[bytes]:
        """Start a command from the repository in a node, or outside of both; its output goes to `log`."""
        if node is not None:
            arguments = ["ip", "netns", "exec", self.namespaces[node], *arguments]
            variables = {**variables, "GLOO_SOCKET_IFNAME": self.interfaces[node]}
        with log.open("wb") as output:
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env={**environment(), **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def forked(self, arguments: Sequence[str], node: int, variables: Mapping[str, str]) -> Ranks:
        """A script in a node, in a process that has imported everything already (see tests/ranks.py)."""
        own = {**environment(), "GLOO_SOCKET_IFNAME": self.interfaces[node], **variables}
        return Ranks(run_in, [own], [(self.namespaces[node], *arguments)])

    def pids(self, node: int) -> list[int]:
        """Processes that run in a node."""
        return [int(pid) for pid in ip("netns", "pids", self.namespaces[node]).split()]

    def ranks(self) -> dict[int, int]:
        """Rank → node of the training processes that run now."""
        found = {}
        for node in (0, 1):
            for pid in self.pids(node):
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if "RANK" in (variables := process.environ()) and "launch/pretrain.py" in process.cmdline():
                        found[int(variables["RANK"])] = node
        return found

    def received(self, node: int) -> int:
        """Bytes that came over the cable."""
        path = f"/sys/class/net/{self.interfaces[node]}/statistics/rx_bytes"
        return int(ip("netns", "exec", self.namespaces[node], "cat", path))

    def remove(self) -> None:
        """Kill whatever still runs in the namespaces and delete them."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        existing = {line.split()[0] for line in ip("netns", "list").splitlines()}
        for node, namespace in enumerate(self.namespaces):
            if namespace in existing:
                wait_until(lambda node=node: not self._kill_all(node), seconds=10)  # type: ignore[misc]
                ip("netns", "delete", namespace)

    def _kill_all(self, node: int) -> list[int]:
        pids = self.pids(node)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids


def run_in(namespace: str, *arguments: str) -> None:
    """In a forked process, which moves into a namespace first."""
    with open(f"/run/netns/{namespace}") as file:
        assert ctypes.CDLL(None).setns(file.fileno(), 0x40000000) == 0  # CLONE_NEWNET; os.setns is Python 3.12's
    run_script(str(ROOT), *arguments)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None:
        pytest.skip("two nodes need network namespaces: no `ip` command (iproute2)")
    name = secrets.token_hex(4)
    made = Nodes((f"manyheads-{name}-0", f"manyheads-{name}-1"), (f"mh{name}-0", f"mh{name}-1"))
    try:
        try:
            made.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two nodes need network namespaces: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> tuple[Path, torch.Tensor]:
    """A configuration, and loss and gradient norm of each of its steps in one process."""
    config = write_run(tmp_path_factory.mktemp("alone"), prepared)
    return config, torch.tensor(numbers(train(config), "loss", "grad_norm"))


def finish(nodes: Nodes, processes: Sequence[subprocess.Popen[bytes]], seconds: float = 100) -> dict[int, int]:
    """Wait until all have ended; every rank that was seen while they ran → its node."""
    ranks: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        assert time.monotonic() < deadline, "the nodes hang"
        ranks |= nodes.ranks()
        time.sleep(0.5)
    return ranks


def check_equal_to_one_process(nodes: Nodes, folder: Path, expected: torch.Tensor) -> None:
    figures = torch.tensor(numbers(metrics(folder), "loss", "grad_norm"))
    torch.testing.assert_close(figures, expected, rtol=2e-5, atol=1e-6)
    weights = load_weights(folder / "checkpoints/step_00000006")
    parameters = sum(weight.nbytes for weight in weights.values())
    assert all(nodes.received(node) > len(expected) * parameters / 2 for node in (0, 1))  # gradients of every step


@pytest.mark.thorough
def test_torchrun_of_the_slurm_script_equals_one_process(
    tmp_path: Path, nodes: Nodes, alone: tuple[Path, torch.Tensor]
) -> None:
    config, expected = alone
    start_slurm_job(nodes, tmp_path, ["--config", str(config), *FSDP, f"--run.folder={tmp_path / 'run'}"])
    ranks = finish(nodes, nodes.processes)
    assert nodes.processes[0].returncode == 0, (tmp_path / "log").read_text()
    assert ranks == {0: 0, 1: 1}
    check_equal_to_one_process(nodes, tmp_path / "run", expected)


@pytest.mark.thorough
@pytest.mark.parametrize("slots", [1, 2])
def test_deepspeed_on_two_nodes_equals_one_process(
    tmp_path: Path, nodes: Nodes, alone: tuple[Path, torch.Tensor], slots: int
) -> None:
    config, expected = alone
    (tmp_path / "hostfile").write_text("".join(f"{address} slots={slots}\n" for address in ADDRESSES))
    launcher = [str(BIN / "deepspeed"), "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--log_level", "warning"]
    launcher += ["--master_addr", ADDRESSES[0], "--master_port", "29500"]
    training = ["launch/pretrain.py", "--config", str(config), f"--run.folder={tmp_path / 'run'}"]
    for node in (0, 1):
        nodes.start([*launcher, "--node_rank", str(node), *training], tmp_path / f"log{node}", node)
    ranks = finish(nodes, nodes.processes)
    logs = [(tmp_path / f"log{node}").read_text() for node in (0, 1)]
    assert [process.returncode for process in nodes.processes] == [0, 0], logs
    assert ranks == {rank: rank // slots for rank in range(2 * slots)}
    check_equal_to_one_process(nodes, tmp_path / "run", expected)


@contextlib.contextmanager
def one_on_each(nodes: Nodes, arguments: Sequence[str]) -> Iterator[tuple[Ranks, Ranks]]:
    """`launch/pretrain.py` on both nodes, as a launcher starts it there."""
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
    }
    arguments = ["launch/pretrain.py", *arguments]
    with (
        nodes.forked(arguments, 0, {**common, "RANK": "0"}) as first,
        nodes.forked(arguments, 1, {**common, "RANK": "1"}) as second,
    ):
        yield first, second


def test_two_nodes_equal_one_process(tmp_path: Path, nodes: Nodes, alone: tuple[Path, torch.Tensor]) -> None:
    """Without a launcher; `make thorough` takes those of DeepSpeed and torch."""
    config, expected = alone
    with one_on_each(nodes, ["--config", str(config), f"--run.folder={tmp_path / 'run'}"]) as ranks:
        assert [each.join(100) for each in ranks] == [[0], [0]], [each.report() for each in ranks]
    check_equal_to_one_process(nodes, tmp_path / "run", expected)


def test_nodes_that_lose_each_other_end_and_say_so(tmp_path: Path, nodes: Nodes, alone: tuple[Path, torch.Tensor]) -> None:
    config, _ = alone
    forever = [*FSDP, "--training.steps=100000", "--validation.every_steps=0", "--parallel.lost_after_seconds=5"]
    written = tmp_path / "run" / "metrics.jsonl"
    with one_on_each(nodes, ["--config", str(config), f"--run.folder={tmp_path / 'run'}", *forever]) as ranks:
        wait_until(lambda: written.exists() and len(written.read_text().splitlines()) >= 3)
        ip("-n", nodes.namespaces[1], "link", "set", nodes.interfaces[1], "down")
        statuses = [each.join(60) for each in ranks]
        errors = [each.errors(0) for each in ranks]
    assert all(status != [0] for status in statuses), errors
    lines = [line for line in errors[0].splitlines() if line.startswith("error:")]
    assert len(lines) == 1, errors
    assert f"error: rank 1 (node {socket.gethostname()}, {ADDRESSES[1]}, pid" in lines[0]
    assert "has not been heard of for" in lines[0]


def start_slurm_job(nodes: Nodes, folder: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Run launch/slurm/torchrun.sbatch as Slurm would on two nodes: outside of both, `srun` starting its task in each."""
    commands = folder / "commands"
    commands.mkdir()
    table = folder / "nodes"
    rows = zip(nodes.namespaces, nodes.interfaces, ADDRESSES, strict=True)
    table.write_text("".join(f"{' '.join(row)}\n" for row in rows))
    (commands / "srun").write_text(SRUN.format(nodes=table))
    (commands / "scontrol").write_text(
        f"#!/bin/sh\necho \"$@\" >> {folder}/scontrol\nprintf '{ADDRESSES[0]}\\n{ADDRESSES[1]}\\n'\n"
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    clone = folder / "clone"  # the script activates .venv of the folder it is submitted from
    clone.mkdir()
    (clone / ".venv").symlink_to(BIN.parent)
    (clone / "launch").symlink_to(ROOT / "launch")
    script = f'cd {clone} && exec bash launch/slurm/torchrun.sbatch "$@"'
    variables = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
    }
    variables["PATH"] = f"{commands}{os.pathsep}{environment()['PATH']}"
    return nodes.start(["bash", "-c", script, "sbatch", *arguments], folder / "log", variables=variables)
