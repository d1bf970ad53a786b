"""Vectors of ZeRO on any number of ranks, against whole tensors cut by torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from pretrain.checkpoints.portable import MOMENTS, WholeFile
from pretrain.checkpoints.zero import Cut, StateFiles, WholeStates, repartition, whole_tensors

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
    found = whole_tensors(StateFiles(tmp_path, 0, []), [SHAPES], stage=3)
    moments = whole_tensors(StateFiles(tmp_path, 0, []), [SHAPES], stage=3, kind="exp_avg")
    assert found.keys() == moments.keys() == SHAPES.keys()
    assert all(torch.equal(found[name], value) for name, value in parameters().items())
    assert all(torch.equal(moments[name], 2 * value) for name, value in parameters().items())


@pytest.mark.parametrize("ranks", [1, 3, 11])
def test_whole_tensors_of_a_group_in_one(tmp_path: Path, ranks: int) -> None:
    """Stages 1 and 2; masters are written without what fills up the last rank's part."""
    values, vectors = sum(shape.numel() for shape in SHAPES.values()), stage_1(ranks)
    for rank, vector in enumerate(vectors):
        own = max(0, min(vector.numel(), values - rank * vector.numel()))
        state = {
            "single_partition_of_fp32_groups": [vector[:own].clone()],
            "base_optimizer_state": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": 2 * vector}}},
        }
        torch.save({"optimizer_state_dict": state}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    states = StateFiles(tmp_path, 0, [])
    for kind, factor in (("model", 1), ("exp_avg", 2)):
        found = whole_tensors(states, [SHAPES], stage=1, kind=kind)  # type: ignore[arg-type]
        assert all(torch.equal(found[name], factor * value) for name, value in parameters().items())
    with pytest.raises(ValueError, match=r"vector has \d+ values, \d+ are expected|there is no data-parallel rank"):
        whole_tensors(states, [{**SHAPES, "more": torch.Size([100])}], stage=1)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_a_portable_file_answers_like_one_rank(ranks: int) -> None:
    class File(WholeFile):
        def __init__(self) -> None:
            self.read: list[str] = []

        def shard(self, kind: str, name: str, shape: torch.Size) -> Tensor:
            self.read.append(name)
            return parameters()[name] * (1 if kind == "model" else 2)

        step = torch.tensor(7.0)

    file, sizes = File(), [shape.numel() for shape in SHAPES.values()]
    states = WholeStates(file, [SHAPES])
    (group,) = states.groups(0)
    assert [name for name, value in group.items() if value.ndim == 1] == list(MOMENTS)
    old = Cut.of_group(sizes, group["exp_avg"])
    for rank, vector in enumerate(stage_1(ranks)):
        new = Cut.of_group(sizes, vector)
        assert torch.equal(repartition(states.weights(0), old, new, rank), vector)
        assert torch.equal(repartition(states.moments(0, "exp_avg"), old, new, rank), 2 * vector)
    old, new = Cut.of_parameters(sizes, 1), Cut.of_parameters(sizes, ranks)
    for rank, vector in enumerate(stage_3(ranks)):
        assert torch.equal(repartition(states.weights(0), old, new, rank), vector)
    file.read = []
    assert torch.equal(states.weights(0)(0)[15:17], torch.cat([parameters()[name].flatten()[:1] for name in ("b", "c")]))
    assert file.read == ["b", "c"]  # no other


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
        whole_tensors(StateFiles(tmp_path, 1, []), [SHAPES], stage=3)
    torch.save({"something": 1}, tmp_path / "zero_pp_rank_0_mp_rank_02_optim_states.pt")
    with pytest.raises(UserError, match=r"zero_pp_rank_0_mp_rank_02_optim_states\.pt: holds no optimizer state"):
        StateFiles(tmp_path, 2, []).groups(0)
