"""Where ranks stand, against DeepSpeed's topology and torch's mesh; groups and meshes by fake ranks; what closing leaves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology, ProcessTopology
from megatron.core import parallel_state
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.schema import ParallelConfig
from pretrain.distributed.layout import AXES, Axis, Layout

SIZES = list(itertools.product((1, 2, 3), (1, 2), (1, 2, 5), (1, 2, 4)))  # in the order of AXES
MIXED = (3, 2, 2, 4)


def layouts(sizes: Sequence[int]) -> Iterator[Layout]:
    """Of every rank."""
    pipeline, replicate, shard, tensor = sizes
    ranks = pipeline * replicate * shard * tensor
    for rank in range(ranks):
        yield Layout(rank, ranks, sizes={"pipeline": pipeline, "replicate": replicate, "tensor": tensor})


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_coordinates_and_neighbours_are_those_of_deepspeeds_topology(sizes: tuple[int, ...]) -> None:
    topology = ProcessTopology(axes=list(AXES), dims=list(sizes))
    pipeline, replicate, shard, tensor = sizes
    merged = PipeModelDataParallelTopology(num_pp=pipeline, num_dp=replicate * shard, num_mp=tensor)
    for layout in layouts(sizes):
        place, merged_place = topology.get_coord(layout.rank), merged.get_coord(layout.rank)
        assert {axis: layout.coordinate(axis) for axis in AXES} == place._asdict()  # type: ignore[arg-type]
        assert (layout.coordinate("data"), layout.size("data")) == (merged_place.data, replicate * shard)
        for axis, lists in [(axis, topology.get_axis_comm_lists(axis)) for axis in AXES]:
            own = [ranks for ranks in lists if layout.rank in ranks] or [[layout.rank]]  # it lists no axis of size 1
            assert [layout.ranks(axis)] == own  # type: ignore[arg-type]
        assert [layout.ranks("data")] == [ranks for ranks in merged.get_axis_comm_lists("data") if layout.rank in ranks]


def test_a_rank_is_the_mixed_radix_number_of_its_coordinates() -> None:
    grid = torch.arange(48).view(MIXED)
    for layout in layouts(MIXED):
        assert grid[tuple(layout.coordinate(axis) for axis in AXES)] == layout.rank  # type: ignore[arg-type]
        assert [layout.size(axis) for axis in AXES] == list(MIXED)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [{"tensor": 3}, {"tensor": 2, "pipeline": 8}, {"shard": 2}, {"context": 2}], ids=str)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="do not fit 8 ranks"):
        Layout(0, 8, sizes=sizes)


def test_a_launchers_environment_and_the_configuration_make_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    alone = Layout.from_environment()
    assert (alone.rank, alone.world_size, alone.size("data"), alone.is_main) == (0, 1, 1, True)
    for name, value in {"RANK": "13", "LOCAL_RANK": "5", "WORLD_SIZE": "16", "LOCAL_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    layout = Layout.from_environment(ParallelConfig(tensor=2, pipeline=2, replicate=2))
    assert dict(layout.sizes) == {"pipeline": 2, "replicate": 2, "shard": 2, "tensor": 2}
    assert (layout.rank, layout.local_rank, layout.local_world_size, layout.is_main) == (13, 5, 8, False)
    assert Layout.from_environment().size("data") == 16


def fake(rank: int, sizes: Sequence[int]) -> Layout:
    return list(layouts(sizes))[rank]


@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 2, 2), (2, 1, 2, 2), (1, 1, 1, 4)], ids=str)
def test_groups_and_mesh_hold_the_ranks_along_their_axes(sizes: tuple[int, ...]) -> None:
    grid = torch.arange(sizes[0] * sizes[1] * sizes[2] * sizes[3]).view(sizes)
    with fake(int(grid[-1, -1, 0, -1]), sizes).opened(FakeStore(), backend="fake") as layout:
        groups: tuple[Axis, ...] = ("pipeline", "data", "tensor")
        for axis in groups:
            assert dist.get_process_group_ranks(layout.group(axis)) == layout.ranks(axis), axis
        assert parallel_state.model_parallel_is_initialized() == (sizes[-1] > 1)
        if sizes[-1] > 1:
            assert layout.group("tensor") is parallel_state.get_tensor_model_parallel_group()
            assert dist.get_process_group_ranks(parallel_state.get_data_parallel_group()) == layout.ranks("data")
        own = layout.mesh("replicate", "shard")
        expected = grid[-1, :, :, -1]
        assert own.mesh.tolist() == (expected if sizes[1] > 1 else expected[0]).tolist()
        assert layout.mesh("replicate", "shard").get_group("shard") is own.get_group("shard")


def test_closing_undoes_what_opening_did_and_what_it_was_told_of() -> None:
    undone: list[str] = []
    for sizes in ((2, 1, 2, 2), (1, 2, 2, 1)):
        layout = fake(0, sizes)
        with suppress(ArithmeticError), layout.opened(FakeStore(), backend="fake"):
            layout.at_close(lambda: undone.append("first"))
            layout.at_close(lambda: undone.append(f"second, {dist.is_initialized()}"))
            layout.mesh("shard")
            raise ArithmeticError("the caller's")
        assert undone == ["second, True", "first"]
        undone.clear()
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()
        with pytest.raises(KeyError):
            layout.group("data")


def test_one_rank_needs_no_store() -> None:
    with Layout().opened() as layout:
        total = torch.ones(1)
        dist.all_reduce(total, group=layout.group("tensor"))
        assert total == 1
        assert layout.group("data") is layout.group("pipeline") is dist.group.WORLD


def test_a_mesh_does_not_find_what_torch_remembers_of_an_equal_one() -> None:
    for _ in range(2):
        with Layout().opened() as layout:
            mesh = layout.mesh("shard")
            rows: Any = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
            assert (rows + rows).device_mesh is mesh
            assert (rows @ rows.T).redistribute(placements=[Replicate()]).device_mesh is mesh
