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


def together(action: Callable[[], object], main_only: bool = False) -> None:
    """Run `action` on every rank, or on the first one; every rank calls it.

    If it fails on one rank, all raise UserError, so that none waits for that rank.
    """
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
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
