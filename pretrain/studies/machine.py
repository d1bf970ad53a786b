"""This machine's cores and GPUs, shared out among children, and processes that do not outlive the sweep. Torch-free."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil

from configs.errors import UserError
from configs.words import counted

ROOT = Path(__file__).resolve().parents[2]  # the repository
PRETRAIN = ROOT / "launch" / "pretrain.py"
SLURM_RANK = (
    "RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1}"
)
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Share:
    """What of the machine one child gets; `gpus` is empty on a machine without any."""

    threads: int  # of each process
    gpus: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """The environment of the child; OMP_NUM_THREADS as the user has set it, if at all."""
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads))}
        if self.gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return {**os.environ, **own}


def shares(jobs: int, processes: int) -> list[Share]:
    """Equal shares for so many children at once, each of so many processes. UserError if there are too few GPUs."""
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * processes))
    gpus = visible_gpus()
    if not gpus:
        return [Share(threads)] * jobs
    if len(gpus) < jobs * processes:
        most = len(gpus) // processes
        advice = f"pass --jobs {most}" if most else f"set processes to at most {len(gpus)}"
        raise UserError(f"{jobs} at once with {counted(processes, 'GPU')} each, on {counted(len(gpus), 'GPU')}: {advice}")
    return [Share(threads, tuple(gpus[job * processes : (job + 1) * processes])) for job in range(jobs)]


def visible_gpus() -> list[str]:
    """Names of the GPUs that processes started here see, as CUDA_VISIBLE_DEVICES has them."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is not None:
        return [name.strip() for name in text.split(",") if name.strip()]
    nvidia = [*Path("/dev").glob("nvidia[0-9]*")]  # a container has those it may use
    amd = [node for node in Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id") if _text(node) not in ("", "0")]
    return [str(number) for number in range(len(nvidia) or len(amd))]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def launcher(processes: int, srun: bool = False) -> list[str]:
    """The command that starts so many ranks, on this machine or as tasks of a Slurm job, without the program's arguments."""
    if srun:  # which gives each task its number; the batch script sets MASTER_ADDR and MASTER_PORT
        tasks = os.environ.get("SLURM_NTASKS")
        if tasks != str(processes):
            raise UserError(
                f"--srun: the job has {tasks or 'no'} tasks, and a child {processes} processes: ask Slurm for as many"
            )
        step = ["srun", "--kill-on-bad-exit=1", "bash", "-c", f'{SLURM_RANK} exec "$@"', "rank"]
        return [*step, sys.executable, str(PRETRAIN)]
    if processes == 1:
        return [sys.executable, str(PRETRAIN)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "--shutdown-timeout=240", str(PRETRAIN)]


def start(command: Sequence[str], environment: dict[str, str], log: TextIO) -> subprocess.Popen[bytes]:
    """Start a child that is asked to save and end if this process dies. Only the main thread may call it.

    It has its own session, so that Ctrl-C in the terminal reaches only the sweep, which passes it on.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=_dies_with(os.getpid()),
    )


def _dies_with(parent: int) -> Callable[[], None]:
    """What a new process calls first: if its parent dies, however it does, it gets SIGTERM."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it

    def ask() -> None:
        if prctl is not None:
            prctl(_DIE_WITH_PARENT, signal.SIGTERM)
            if os.getppid() != parent:  # it died before
                os._exit(1)

    return ask


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a child with all its ranks, which are in sessions of their own."""
    with suppress(psutil.Error):
        for rank in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                rank.kill()
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
