"""Vectors of ZeRO on any number of ranks, against whole tensors cut by torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from pretrain.backends.zero_shards import Cut, GroupState, read_states, repartition, state_files, whole_weights

SHAPES = {"a": torch.Size([5, 3]), "b": torch.Size([1]), "c": torch.Size([4, 4]), "d": torch.Size([2])}


def parameters() -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + shape.numel()))
        for name, shape in SHAPES.items()
    }


def filled(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - values.numel())])


def stage_3(ranks: int) -> list[Tensor]:
    """Every parameter in as many equal parts as there are ranks."""
    cut = [filled(p.flatten(), ranks * math.ceil(p.numel() / ranks)).chunk(ranks) for p in parameters().values()]
    return [torch.cat([parts[rank] for parts in cut]) for rank in range(ranks)]


def stage_1(ranks: int, alignment: int = 2) -> list[Tensor]:
    """All parameters together, filled up to a multiple of alignment * ranks."""
    flat = torch.cat([p.flatten() for p in parameters().values()])
    return list(filled(flat, math.ceil(flat.numel() / (alignment * ranks)) * alignment * ranks).chunk(ranks))


@pytest.mark.parametrize("new", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("old", [1, 2, 3, 7, 40])
def test_a_vector_of_any_rank_from_those_of_any_number_of_ranks(old: int, new: int) -> None:
    sizes = [shape.numel() for shape in SHAPES.values()]
    before, after = (Cut.of_parameters(sizes, ranks) for ranks in (old, new))
    for rank, expected in enumerate(stage_3(new)):
        assert torch.equal(repartition(stage_3(old), before, after, rank), expected)
    before, after = (Cut.of_group(sizes, stage_1(ranks)[0]) for ranks in (old, new))
    for rank, expected in enumerate(stage_1(new)):
        assert torch.equal(repartition(stage_1(old), before, after, rank), expected)


@pytest.mark.parametrize("ranks", [1, 3])
def test_whole_weights_by_name(ranks: int) -> None:
    found = whole_weights([GroupState(tuple(stage_3(ranks)), {}, {})], [SHAPES])
    assert found.keys() == SHAPES.keys()
    assert all(torch.equal(found[name], value) for name, value in parameters().items())


def test_files_are_read_in_the_order_of_ranks_and_not_executed(tmp_path: Path) -> None:
    for rank in (10, 2, 0):
        moments = {"step": torch.tensor(3.0), "exp_avg": torch.full((2,), float(rank))}
        state = {"fp32_flat_groups": [torch.full((2,), float(rank))], "optimizer_state_dict": {"state": {0: moments}}}
        torch.save({"optimizer_state_dict": state}, tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_01_optim_states.pt")
    assert state_files(tmp_path, 0) == []
    (group,) = read_states(tmp_path, 1, [])
    assert [float(weights[0]) for weights in group.weights] == [0, 2, 10]
    assert [float(vector[0]) for vector in group.moments["exp_avg"]] == [0, 2, 10]
    assert group.scalars == {"step": torch.tensor(3.0)}
    with pytest.raises(UserError, match="holds no optimizer state of DeepSpeed ZeRO for model-parallel rank 0"):
        read_states(tmp_path, 0, [])
    torch.save({"something": 1}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError, match=r"zero_pp_rank_0_mp_rank_00_optim_states\.pt: holds no optimizer state"):
        read_states(tmp_path, 0, [])
