"""Who am I among the processes: ranks, device, seeds and the few reductions that the loop needs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place. With data parallelism alone, the data rank is the global rank."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """One rank speaks and writes what all share."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """Read what `deepspeed`, `torchrun` or nobody (one process) put into the environment."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=local_rank,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"),
            device=device,
        )


def prepare_process(world: World, deterministic: bool) -> None:
    """Device, threads and determinism of this process; before any tensor is made."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    if deterministic and world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # with warn_only attention's backward would stay as it is
        deterministic_options: Any = torch.utils.deterministic
        deterministic_options.fill_uninitialized_memory = False  # costs time and changes no result of ours


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose and rank: runs with neighbouring seeds share none."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value averaged over all ranks, in float64; the same on every rank."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def together(action: Callable[[], object], main_only: bool = False) -> None:
    """Run `action` on every rank, or on the first; what fails on one rank raises UserError on all: none waits for it."""
    failure = None
    if not main_only or not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except (OSError, RuntimeError, UserError) as error:
            failure = str(error) or type(error).__name__
    for text in gather_objects(failure):
        if text:
            raise UserError(text)


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
