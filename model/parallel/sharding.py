"""Whole parameters and the shards of them that tensor-parallel ranks hold.

A shard differs from its parameter in the length of one dimension, so that shapes alone say how it was cut: rank r holds rows
(or columns) [r·n, (r + 1)·n). The last shards of a vocabulary that does not divide are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cut(whole: Tensor, shape: torch.Size, rank: int) -> Tensor:
    """The shard of `shape` that `rank` holds of `whole`."""
    dim = _cut_dimension(whole.shape, shape)
    if dim is None:
        return whole
    length = shape[dim]
    start = min(rank * length, whole.shape[dim])
    shard = whole.narrow(dim, start, min(length, whole.shape[dim] - start))
    if shard.shape == shape:
        return shard
    return torch.cat([shard, whole.new_zeros(*shape[:dim], length - shard.shape[dim], *shape[dim + 1 :])], dim)


def join(shards: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The whole parameter of `shape` from the shards of all ranks, in the order of ranks."""
    dim = _cut_dimension(shape, shards[0].shape)
    return shards[0] if dim is None else torch.cat(list(shards), dim).narrow(dim, 0, shape[dim])


def _cut_dimension(whole: torch.Size, shard: torch.Size) -> int | None:
    """The one dimension in which the shapes differ; None where they do not."""
    different = [dim for dim, lengths in enumerate(zip(whole, shard, strict=True)) if lengths[0] != lengths[1]]
    if len(different) > 1:
        raise ValueError(f"{tuple(shard)} is no shard of {tuple(whole)}")
    return different[0] if different else None
