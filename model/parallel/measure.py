"""How long the layers of a row take, to balance pipeline stages by time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layers import Layers
from model.parallel.pipeline import StagePart

MEASUREMENTS = 3


def measured_weights(
    parts: Sequence[StagePart],
    layers: Layers,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    init_std: float,
) -> list[int]:
    """Microseconds of each layer's forward and backward pass; the same on every rank.

    `inputs` are the first layer's, on the device that runs. `loss` makes a scalar of what the last layer gives; its
    time counts as that layer's.

    One block of each attention is measured on behalf of all. Every rank must call this, since layers may be sharded; rank 0's
    times are used.
    """
    times: list[int] = []
    of_kinds: dict[object, int] = {}  # of a block, by what makes blocks of its kind alike
    hidden: Any = inputs
    for number, part in enumerate(parts):
        if part.layer.block in of_kinds:
            times.append(of_kinds[part.layer.block])
            continue
        module = part.build().to(inputs.device, dtype)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=init_std)
        last = number == len(parts) - 1
        hidden, seconds = _timed(module, hidden, loss if last else _sum_of_states)
        times.append(max(1, round(seconds * 1e6)))
        if part.layer.block is not None:
            of_kinds[part.layer.block] = times[-1]
    layers.auxiliary.take()  # not part of any step
    shared = [times]
    dist.broadcast_object_list(shared, src=0, device=inputs.device)
    return shared[0]


def _timed(module: nn.Module, hidden: Any, value: Callable[[Any], Tensor]) -> tuple[Any, float]:
    """The module's output, and the median time of both passes; `value` returns the scalar that is differentiated."""
    seconds = []
    for _ in range(MEASUREMENTS + 1):  # the first one is a warmup
        inputs = _leaf(hidden)
        _wait(inputs)
        started = time.perf_counter()
        out = module(inputs)
        value(out).backward()
        _wait(inputs)
        seconds.append(time.perf_counter() - started)
    return out, median(seconds[1:])


def _sum_of_states(hidden: Any) -> Tensor:
    return _states(hidden).sum()


def _states(hidden: Any) -> Tensor:
    """The hidden states, without the documents."""
    states: Tensor = hidden[0] if isinstance(hidden, tuple) else hidden
    return states


def _leaf(hidden: Any) -> Any:
    """The same values, detached from their graph; hidden states require a gradient."""
    if isinstance(hidden, tuple):
        return _leaf(hidden[0]), hidden[1]
    return hidden.detach().requires_grad_(hidden.is_floating_point())


def _wait(hidden: Any) -> None:
    device = _states(hidden).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
