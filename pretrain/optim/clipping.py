"""Clipping by the global norm, for engines that do not bring their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

ROW = 1024  # so short that fp32 is exact to 1e-8, so long that it is as fast as one sum
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
    squared = _squares(_gradients(counted)).to(device)
    for group in groups:
        dist.all_reduce(squared, group=group)
    norm = float(squared.sqrt())
    own = _gradients(parameters)
    if own and 0 < limit < norm + MARGIN:
        torch._foreach_mul_(own, limit / (norm + MARGIN))
    return norm


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of all values, float64, exact to 1e-8."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if tensors[0].is_cuda:  # its kernels add up in a tree
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
    # On CPUs torch adds up a tensor's squares one after the other, in its own precision: −5e-3 at 2^26 values of fp32.
    return torch.stack([_of_rows(tensor.flatten()) for tensor in tensors]).sum()


def _of_rows(values: Tensor) -> Tensor:
    """The sum of squares of a vector: in its own precision for each row of ROW values, over rows in float64."""
    full = values.numel() // ROW * ROW
    rows, rest = values[:full].view(-1, ROW), values[full:].double()
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum() + rest.square().sum()


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards of those that there are."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
