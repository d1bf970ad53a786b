"""Clipping by the global norm, for engines that do not bring their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

MARGIN = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed's ZeRO optimizers have it


def clip_gradients(
    parameters: Iterable[Tensor],
    counted: Iterable[Tensor],
    groups: Sequence[dist.ProcessGroup],
    limit: float,
    device: torch.device,
) -> float:
    """Scale the gradients of `parameters` as torch.nn.utils.clip_grad_norm_ would those of the unsharded model.

    Returns their norm before: that of this rank's shards of `counted` over the ranks of all `groups`, summed group after group;
    every parameter of the model counts on one of them. A `limit` of 0 scales nothing. `device` is the collectives'.
    """
    squared = torch.nn.utils.get_total_norm(_gradients(counted)).to(device, torch.float64).square()
    for group in groups:
        dist.all_reduce(squared, group=group)
    norm = float(squared.sqrt())
    own = _gradients(parameters)
    if own and 0 < limit < norm + MARGIN:
        torch._foreach_mul_(own, limit / (norm + MARGIN))
    return norm


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards of those that there are."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
