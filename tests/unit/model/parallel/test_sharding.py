"""Shards of parameters by the specs that layers declare, against torch's own slices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.parallel.sharding import Spec, counted_once, partition_specs


@pytest.mark.parametrize(
    ("shape", "spec", "shard"),
    [
        ((12, 5), Spec(0, 4), (3, 5)),
        ((5, 12), Spec(1, 4), (5, 3)),
        ((8,), Spec(0, 4), (2,)),
        ((10, 3), Spec(0, 4, padding=2), (3, 3)),
        ((5, 2), Spec(0, 4, padding=3), (2, 2)),  # the last shard is all padding
        ((4, 4), Spec(), (4, 4)),
        ((1, 3), Spec(0, 1), (1, 3)),
    ],
)
def test_shards_make_up_the_parameter(shape: tuple[int, ...], spec: Spec, shard: tuple[int, ...]) -> None:
    parameter = torch.randn(shape)
    shards = [spec.shard(parameter, rank) for rank in range(spec.ranks)]
    assert [tuple(part.shape) for part in shards] == [shard] * spec.ranks
    assert torch.equal(spec.unshard(shards), parameter)
    padded = torch.zeros(*(n + spec.padding * (dim == spec.dim) for dim, n in enumerate(shape)))
    padded[tuple(slice(0, n) for n in shape)] = parameter
    for rank, part in enumerate(shards):
        origin = spec.origin(parameter.shape, rank)
        assert torch.equal(part, padded[tuple(slice(o, o + n) for o, n in zip(origin, shard, strict=True))])


class Sharded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
        self.partition = {"weight": Spec(1, 2)}


def test_specs_are_collected_by_name() -> None:
    model = nn.ModuleDict({"first": nn.Sequential(nn.Linear(2, 2), Sharded()), "second": Sharded()})
    replicated = dict.fromkeys(("first.0.weight", "first.0.bias", "first.1.scale", "second.scale"), Spec())
    specs = partition_specs(model)
    assert specs == {**replicated, "first.1.weight": Spec(1, 2), "second.weight": Spec(1, 2)}
    assert counted_once(specs, 0) == specs.keys()
    assert counted_once(specs, 1) == specs.keys() - replicated.keys()


def test_a_view_where_there_is_no_padding() -> None:
    parameter: Tensor = torch.randn(6, 2)
    assert Spec(0, 3).shard(parameter, 1).data_ptr() == parameter[2:].data_ptr()
    assert Spec().shard(parameter, 1) is parameter
