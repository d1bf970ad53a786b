"""How a model's parameters are sharded over tensor-parallel ranks: each layer declares it, and this collects the specs.

A layer that holds shards has `partition`, a mapping from the names of its own parameters to their `Spec`. A parameter without
a spec is replicated: every rank holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    """Rank r of `ranks` holds the r-th of equal slices along `dim`; None: every rank holds all of it.

    `padding` rows of zeros at the end make the slices equal (for a vocabulary that is not divisible by the ranks).
    """

    dim: int | None = None
    ranks: int = 1
    padding: int = 0

    def origin(self, shape: torch.Size, rank: int) -> tuple[int, ...]:
        """Where the rank's shard begins in a parameter of `shape`; at or past its end if the shard is all padding."""
        return tuple(rank * self._length(shape) if dim == self.dim else 0 for dim in range(len(shape)))

    def shard(self, unsharded: Tensor, rank: int) -> Tensor:
        """The rank's shard; a view unless it has padding."""
        if self.dim is None:
            return unsharded
        shape, length = unsharded.shape, self._length(unsharded.shape)
        start = min(rank * length, shape[self.dim])
        shard = unsharded.narrow(self.dim, start, min(length, shape[self.dim] - start))
        missing = length - shard.shape[self.dim]
        if missing == 0:
            return shard
        return torch.cat([shard, shard.new_zeros(*shape[: self.dim], missing, *shape[self.dim + 1 :])], self.dim)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The unsharded parameter, from the shards of all ranks in order."""
        if self.dim is None:
            return shards[0]
        joined = torch.cat(list(shards), self.dim)
        return joined.narrow(self.dim, 0, joined.shape[self.dim] - self.padding)

    def _length(self, shape: torch.Size) -> int:
        assert self.dim is not None
        return (shape[self.dim] + self.padding) // self.ranks


def partition_specs(module: nn.Module) -> dict[str, Spec]:
    """The spec of every parameter by its name in `module`. Call it before an engine replaces parameters or modules."""
    specs = {}
    for name, _ in module.named_parameters():
        owner, _, own_name = name.rpartition(".")
        declared: Mapping[str, Spec] = getattr(module.get_submodule(owner), "partition", {})
        specs[name] = declared.get(own_name, Spec())
    return specs


def counted_once(specs: Mapping[str, Spec], rank: int) -> set[str]:
    """The parameters to count on this tensor-parallel rank, so that over all ranks each value counts once."""
    return {name for name, spec in specs.items() if rank == 0 or spec.dim is not None}
