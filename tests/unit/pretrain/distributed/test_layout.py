"""Where ranks stand, against DeepSpeed's topology and torch's mesh; groups and meshes by fake ranks; what closing leaves."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology, ProcessTopology
from megatron.core import parallel_state
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.schema import ParallelConfig
from pretrain.distributed.layout import AXES, Axis, Layout
from tests.helpers import ROOT

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
        for axis in get_args(Axis):
            assert dist.get_process_group_ranks(layout.group(axis)) == layout.ranks(axis), axis
        assert parallel_state.model_parallel_is_initialized() == (sizes[-1] > 1)
        if sizes[-1] > 1:
            assert layout.group("tensor") is parallel_state.get_tensor_model_parallel_group()
            assert dist.get_process_group_ranks(parallel_state.get_data_parallel_group()) == layout.ranks("data")
        made = list(dist.distributed_c10d._world.pg_map)
        own = layout.mesh("replicate", "shard")
        assert list(dist.distributed_c10d._world.pg_map) == made  # no rank waits for another one
        assert own.get_group("shard") is layout.group("shard")
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


def test_an_opening_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = fake(0, (2, 1, 2, 2))
    with monkeypatch.context() as patch:
        patch.setattr(dist, "new_group", failing_after(6, dist.new_group))
        with pytest.raises(ArithmeticError, match="group 7"), layout.opened(FakeStore(), backend="fake"):
            pytest.fail("it is not open")
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    with layout.opened(FakeStore(), backend="fake"):
        assert layout.group("tensor") is parallel_state.get_tensor_model_parallel_group()


def failing_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    numbers = itertools.count(1)

    def failing(*arguments: Any, **options: Any) -> Any:
        if (number := next(numbers)) > calls:
            raise ArithmeticError(f"group {number} cannot be made")
        return function(*arguments, **options)

    return failing


def test_what_fails_to_be_undone_keeps_nothing_else_from_it() -> None:
    layout, undone = fake(0, (1, 1, 2, 2)), list[str]()
    layout.open(FakeStore(), backend="fake")
    layout.at_close(lambda: undone.append("first"))
    layout.at_close(lambda: list[str]().remove("second"))
    layout.at_close(lambda: undone.append("third"))
    with pytest.raises(ValueError, match="not in list"):
        layout.close()
    assert undone == ["third", "first"]
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    layout.close()  # nothing is left to be undone


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (2, 1, 2, 2)], ids=str)
def test_every_group_gets_the_timeout_when_it_is_made(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    make, given = dist.new_group, list[Any]()

    def new_group(*arguments: Any, **options: Any) -> Any:
        given.append(options.get("timeout"))
        return make(*arguments, **options)

    monkeypatch.setattr(dist, "new_group", new_group)
    with fake(0, sizes).opened(FakeStore(), timedelta(minutes=61.5), "fake") as layout:
        opened = len(given)
        own, others = layout.group_of([0, 1, 2]), layout.group_of(range(4, 7))
        assert dist.get_process_group_ranks(own) == [0, 1, 2]
        assert others is dist.GroupMember.NON_GROUP_MEMBER
        assert len(given) == opened + 2
        assert layout.group_of([0, 1, 2]) is own
        assert layout.group_of(layout.ranks("data")) is layout.group("data")
        assert len(given) == opened + 2
    assert set(given) == {timedelta(minutes=61.5)}


def test_nothing_else_in_training_makes_groups_or_asks_torch_who_is_in_them() -> None:
    asks = re.compile(r"dist\.(get_rank|get_world_size|is_initialized|new_group|distributed_c10d)|get_pipe_parallel_group")
    exempt = ("layout.py", "collectives.py")
    files = [path for path in (ROOT / "pretrain").rglob("*.py") if path.name not in exempt]
    assert len(files) > 40
    assert [path.name for path in files if asks.search(path.read_text(encoding="utf-8"))] == []


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
