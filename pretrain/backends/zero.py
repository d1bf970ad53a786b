"""How DeepSpeed's ZeRO optimizers shard fp32 master weights: where each parameter's values are in a rank's vectors.

Stages 1 and 2 lay the parameters of an optimizer group end to end and give each data-parallel rank an equal share of that row.
Stage 3 shares out every parameter by itself; a rank's vector is its share of one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.optim.registry import Kept
from pretrain.optim.state import KEPT, kept_of


@dataclass(frozen=True)
class Fragment:
    """Values [start, stop) of a flattened parameter, which a vector holds from `position` on."""

    parameter: nn.Parameter
    start: int
    stop: int
    position: int

    def of(self, vector: Tensor) -> Tensor:
        """The values of this fragment in the master vector, or in one of the optimizer's beside it."""
        return vector.detach().view(-1)[self.position : self.position + self.stop - self.start]


Held = tuple[Tensor, Kept, list[Fragment]]  # a vector, what the optimizer keeps of it, and the fragments in it


def plain_vectors(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Held]:
    """The parameters themselves, for an optimizer that nothing shards (stage 0)."""
    kept = kept_of(optimizer)
    for parameter in module.parameters():
        yield parameter, kept[parameter], [Fragment(parameter, 0, parameter.numel(), 0)]


def master_vectors(optimizer: Any, data_rank: int) -> Iterator[Held]:
    """This rank's vector of each parameter group; what only fills up a vector belongs to no fragment."""
    for group, (vector, fragments) in zip(optimizer.param_groups, _vectors(optimizer, data_rank), strict=True):
        yield vector, group[KEPT], fragments


def _vectors(optimizer: Any, data_rank: int) -> Iterator[tuple[Tensor, list[Fragment]]]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for vector, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            yield vector, list(_stage_3(group, data_rank))
    elif hasattr(optimizer, "fp32_groups_flat_partition"):  # its optimizer for bf16 at stage 1
        for vector, group in zip(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, strict=True):
            begins = accumulate((parameter.numel() for parameter in group), initial=0)
            yield vector, list(_in_a_row(vector, list(zip(group, begins, strict=False)), data_rank))
    else:
        groups = zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True)
        for vector, (group, begins) in zip(optimizer.single_partition_of_fp32_groups, groups, strict=True):
            yield vector, list(_in_a_row(vector, list(zip(group, begins, strict=True)), data_rank))


def update_weights(optimizer: Any) -> None:
    """Bring the weights that the model computes with in line with the masters. Every rank calls it; collectives run."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # gives up what is gathered of the old weights
    for number in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    optimizer.checkpoint_event_epilogue()


def _in_a_row(vector: Tensor, parameters: list[tuple[nn.Parameter, int]], data_rank: int) -> Iterator[Fragment]:
    """Of parameters and where each begins in the row of which `vector` is a rank's share."""
    first = data_rank * vector.numel()
    for parameter, begin in parameters:
        start, stop = max(first - begin, 0), min(first + vector.numel() - begin, parameter.numel())
        if start < stop:
            yield Fragment(parameter, start, stop, begin + start - first)


def _stage_3(group: list[Any], data_rank: int) -> Iterator[Fragment]:
    position = 0
    for parameter in group:
        share = parameter.ds_tensor.ds_numel
        start, stop = data_rank * share, min((data_rank + 1) * share, parameter.ds_numel)
        if start < stop:
            yield Fragment(parameter, start, stop, position)
        position += share
