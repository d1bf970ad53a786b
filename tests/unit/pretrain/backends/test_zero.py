"""Which values of which parameters lie in a rank's vector, against parameters that torch shards as ZeRO does."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.backends.zero import master_vectors, plain_vectors
from pretrain.optim.registry import Kept
from pretrain.optim.state import KEPT

KEPT_OF_GROUPS = [{KEPT: Kept(("momentum",))}, {KEPT: Kept()}]
GROUPS: list[list[tuple[int, ...]]] = [[(5, 3), (1,), (4, 4)], [(2,), (7,)]]


def parameters() -> list[list[Any]]:
    draw = torch.Generator().manual_seed(1)
    return [[nn.Parameter(torch.randn(shape, generator=draw)) for shape in group] for group in GROUPS]


def padded(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_full((length - values.numel(),), torch.nan)])


def in_a_row(group: list[Any], ranks: int, rank: int, alignment: int) -> Tensor:
    flat = torch.cat([parameter.detach().flatten() for parameter in group])
    return padded(flat, math.ceil(flat.numel() / (alignment * ranks)) * alignment * ranks).chunk(ranks)[rank]


def begins(group: list[Any]) -> list[int]:
    return [sum(parameter.numel() for parameter in group[:number]) for number in range(len(group))]


def stage_1(groups: list[list[Any]], ranks: int, rank: int) -> Any:
    return SimpleNamespace(
        param_groups=KEPT_OF_GROUPS,
        single_partition_of_fp32_groups=[in_a_row(group, ranks, rank, 2) for group in groups],
        round_robin_bit16_groups=groups,
        round_robin_bit16_offsets=[begins(group) for group in groups],
    )


def bf16(groups: list[list[Any]], ranks: int, rank: int) -> Any:
    vectors = [in_a_row(group, ranks, rank, 4) for group in groups]
    return SimpleNamespace(param_groups=KEPT_OF_GROUPS, fp32_groups_flat_partition=vectors, bf16_groups=groups)


def stage_3(groups: list[list[Any]], ranks: int, rank: int) -> Any:
    vectors = []
    for group in groups:
        shares = []
        for parameter in group:
            share = math.ceil(parameter.numel() / ranks)
            parameter.ds_numel, parameter.ds_tensor = parameter.numel(), SimpleNamespace(ds_numel=share)
            shares.append(padded(parameter.detach().flatten(), ranks * share).chunk(ranks)[rank])
        vectors.append(torch.cat(shares))
    return SimpleNamespace(param_groups=KEPT_OF_GROUPS, fp32_partitioned_groups_flat=vectors, fp16_groups=groups)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("optimizer", [stage_1, bf16, stage_3])
def test_fragments_of_all_ranks_make_up_the_parameters(optimizer: Any, ranks: int) -> None:
    groups = parameters()
    found = {parameter: torch.full((parameter.numel(),), torch.nan) for group in groups for parameter in group}
    for rank in range(ranks):
        vectors = list(master_vectors(optimizer(groups, ranks, rank), rank))
        assert [kept for _, kept, _ in vectors] == [Kept(("momentum",)), Kept()]
        for vector, _, fragments in vectors:
            assert sum(fragment.stop - fragment.start for fragment in fragments) == int((~vector.isnan()).sum())
            for fragment in fragments:
                own = found[fragment.parameter][fragment.start : fragment.stop]
                assert bool(own.isnan().all())
                own.copy_(fragment.of(vector))
    assert all(torch.equal(values.view(parameter.shape), parameter) for parameter, values in found.items())


def test_without_sharding_a_parameter_is_its_own_vector() -> None:
    module = nn.Linear(3, 2)
    groups = [{"params": [module.bias], KEPT: Kept()}, {"params": [module.weight], KEPT: Kept(("momentum",))}]
    vectors = plain_vectors(module, torch.optim.SGD(groups))
    for (name, parameter), (vector, kept, (fragment,)) in zip(module.named_parameters(), vectors, strict=True):
        assert vector is parameter
        assert kept.states == (("momentum",) if name == "weight" else ())
        values = fragment.of(vector)
        assert not values.requires_grad
        values.fill_(3.0)
        assert bool((parameter == 3).all())
