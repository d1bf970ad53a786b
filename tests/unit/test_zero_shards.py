"""Vectors of ZeRO on any number of ranks, against whole tensors cut by torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from pretrain.backends.zero_shards import Cut, StateFiles, repartition, whole_weights

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
        assert torch.equal(repartition(stage_3(old).__getitem__, before, after, rank), expected)
    before, after = (Cut.of_group(sizes, stage_1(ranks)[0]) for ranks in (old, new))
    for rank, expected in enumerate(stage_1(new)):
        assert torch.equal(repartition(stage_1(old).__getitem__, before, after, rank), expected)


def write_states(folder: Path, vectors: list[Tensor], model_rank: int = 0) -> None:
    """Files of stage 3, with moments that are twice the weights."""
    for rank, vector in enumerate(vectors):
        inner = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": 2 * vector}}}
        content = {"optimizer_state_dict": {"fp32_flat_groups": [vector], "optimizer_state_dict": inner}}
        torch.save(content, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_{model_rank:02d}_optim_states.pt")


@pytest.mark.parametrize("ranks", [1, 3, 11])
def test_whole_weights_by_name(tmp_path: Path, ranks: int) -> None:
    write_states(tmp_path, stage_3(ranks))
    found = whole_weights(StateFiles(tmp_path, 0, []), [SHAPES])
    assert found.keys() == SHAPES.keys()
    assert all(torch.equal(found[name], value) for name, value in parameters().items())


def test_only_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    write_states(tmp_path, stage_3(4))
    states, sizes = StateFiles(tmp_path, 0, []), [shape.numel() for shape in SHAPES.values()]
    same = Cut.of_parameters(sizes, 4)
    assert torch.equal(repartition(states.moments(0, "exp_avg"), same, same, 2), 2 * stage_3(4)[2])
    assert list(states.opened) == [2]


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="that of data-parallel rank 0 of model-parallel rank 0 is missing"):
        StateFiles(tmp_path, 0, [])
    write_states(tmp_path, stage_3(3))
    (tmp_path / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="that of data-parallel rank 1 of model-parallel rank 0 is missing"):
        StateFiles(tmp_path, 0, [])
    write_states(tmp_path, stage_3(3)[:2], model_rank=1)  # the last one of three
    with pytest.raises(ValueError, match=r"rank 0's vector has \d+ values, \d+ are expected|there is no data-parallel rank 2"):
        whole_weights(StateFiles(tmp_path, 1, []), [SHAPES])
    torch.save({"something": 1}, tmp_path / "zero_pp_rank_0_mp_rank_02_optim_states.pt")
    with pytest.raises(UserError, match=r"zero_pp_rank_0_mp_rank_02_optim_states\.pt: holds no optimizer state"):
        StateFiles(tmp_path, 2, []).groups(0)
