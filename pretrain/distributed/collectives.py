"""The few collective operations that the loop and its hooks need besides an engine's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import UserError


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


def gather_to_main(value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks, on the first rank; an empty list on the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or []


def broadcast_object(value: Any) -> Any:
    """The first rank's `value`, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    sent = [value]
    dist.broadcast_object_list(sent)
    return sent[0]


class OtherRankError(UserError):
    """A fault of the program on another rank, which reports it with its traceback."""


def together(action: Callable[[], object], main_only: bool = False) -> None:
    """Run `action` on every rank, or on the first one; every rank calls it.

    If it fails on one rank, all raise, so that none waits for that rank: if a user can mend it, its UserError, or one in the
    place of an OSError.
    Of any other exception, a fault of the program, the others raise OtherRankError, and its own rank raises it again.
    """
    failure: Exception | None = None
    if not main_only or not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    name, mendable = type(failure).__name__, None
    if isinstance(failure, OSError | UserError):
        mendable = type(failure) if isinstance(failure, UserError) else UserError
    failures = gather_objects(None if failure is None else (mendable, name, str(failure)))
    if failure is not None and mendable is None:
        raise failure
    for rank, found in enumerate(failures):
        if found is not None:
            mendable, name, text = found
            if mendable is None:
                raise OtherRankError(f"rank {rank} failed: {_line(name, text)}")
            raise mendable.__new__(mendable, text or name)  # whatever its constructor takes, this is its text


def _line(name: str, text: str) -> str:
    """An exception as the last line of its traceback shows it, or the first line of that."""
    return f"{name}: {text}".splitlines()[0] if text else name


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
