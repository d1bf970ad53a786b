"""Where a rank stands: its coordinates on named axes of parallelism, and the process groups and mesh along them.

To add an axis, put its name into `AXES` and `Axis`, and its size into `Layout.from_environment`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from configs import launcher
from configs.packages import quiet_megatron
from configs.schema import ParallelConfig

AXES = ("pipeline", "replicate", "shard", "tensor")  # slowest first: tensor-parallel ranks are neighbours
PRODUCTS = {"data": ("replicate", "shard"), "world": AXES}  # several axes taken as one
Axis = Literal["pipeline", "replicate", "shard", "tensor", "data", "world"]
CPU = torch.device("cpu")
DEFAULT_TIMEOUT = timedelta(minutes=30)


@dataclass(eq=False)
class Layout:
    """The place of this process among all ranks.

    A rank is the mixed-radix number of its coordinates in the order of `AXES`, as in Megatron and DeepSpeed. Sizes and
    coordinates need no process group; `group`, `group_of` and `mesh` need an open layout. `close` undoes all process-wide
    state, so that one process can open several layouts one after the other.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = CPU
    sizes: Mapping[str, int] = field(default_factory=dict)  # of axes; absent ones have size 1, and "shard" takes the rest

    def __post_init__(self) -> None:
        given = {axis: self.sizes.get(axis, 1) for axis in AXES if axis != "shard"}
        shard, rest = divmod(self.world_size, math.prod(given.values()))
        if rest or self.sizes.keys() - given.keys():
            raise ValueError(f"{dict(self.sizes)} do not fit {self.world_size} ranks")
        self.sizes = {axis: given.get(axis, shard) for axis in AXES}
        self._groups: dict[tuple[int, ...], Any] = {}  # by ranks; NON_GROUP_MEMBER where this one is not among them
        self._timeout = DEFAULT_TIMEOUT
        self._mesh: DeviceMesh | None = None
        self._undo = ExitStack()  # what `close` undoes

    @classmethod
    def from_environment(cls, parallel: ParallelConfig | None = None) -> Layout:
        """Read what `deepspeed`, `torchrun` or nobody (one process) put into the environment.

        Without `parallel` all ranks are data-parallel.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        sizes = {}
        if parallel is not None:
            sizes = {"pipeline": parallel.pipeline, "replicate": parallel.replicate, "tensor": parallel.tensor}
        return cls(
            rank=launcher.rank(),
            world_size=launcher.world_size(),
            local_rank=local_rank,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"),
            device=torch.device("cuda", local_rank) if torch.cuda.is_available() else CPU,
            sizes=sizes,
        )

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, and writes what all ranks share."""
        return self.rank == 0

    def size(self, axis: Axis) -> int:
        """The number of ranks along `axis`."""
        return math.prod(self.sizes[part] for part in _parts(axis))

    def coordinate(self, axis: Axis) -> int:
        """This rank's place along `axis`, from 0 to `size(axis)` - 1."""
        place = 0
        for part in _parts(axis):
            place = place * self.sizes[part] + self.rank // _stride(self.sizes, part) % self.sizes[part]
        return place

    def ranks(self, axis: Axis) -> list[int]:
        """The ranks that differ from this one in their coordinate on `axis` alone, itself included, in that order."""
        return next(line for line in self._lines(axis) if self.rank in line)

    def _lines(self, axis: Axis) -> list[list[int]]:
        """All ranks, divided into those that share every coordinate but the one on `axis`."""

        def offsets(axes: tuple[str, ...]) -> list[int]:
            steps = [range(0, self.sizes[part] * (stride := _stride(self.sizes, part)), stride) for part in axes]
            return [sum(step) for step in product(*steps)]

        along = _parts(axis)
        across = tuple(part for part in AXES if part not in along)
        return [[first + step for step in offsets(along)] for first in offsets(across)]

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """The process group of `ranks(axis)`."""
        group: dist.ProcessGroup = self._groups[tuple(self.ranks(axis))]
        return group

    def group_of(self, ranks: Sequence[int]) -> Any:
        """The process group of `ranks`, made at the first call; torch's NON_GROUP_MEMBER where this rank is not among them.

        Every rank calls it, with the same `ranks`.
        """
        key = tuple(ranks)
        if key not in self._groups:
            self._groups[key] = dist.new_group(list(ranks), timeout=self._timeout)
        return self._groups[key]

    def mesh(self, *axes: Axis) -> DeviceMesh:
        """The part of a mesh of all ranks that this rank and its neighbours along `axes` form; axes in the order of `AXES`.

        Axes of size 1 are left out, except "shard". The mesh communicates in the layout's groups; no collective runs.
        """
        sizes: dict[Any, int] = {axis: size for axis, size in self.sizes.items() if size > 1 or axis == "shard"}
        if self._mesh is None:
            grid, groups = torch.arange(self.world_size).view(*sizes.values()), [self.group(axis) for axis in sizes]
            self._mesh = DeviceMesh.from_group(groups, self.device.type, grid, mesh_dim_names=tuple(sizes))
            self._undo.callback(self._forget_mesh)
        return self._mesh[tuple(axis for axis in axes if axis in sizes)]

    @contextmanager
    def opened(
        self, store: dist.Store | None = None, timeout: timedelta = DEFAULT_TIMEOUT, backend: str | None = None
    ) -> Iterator[Layout]:
        """`open` for the `with` block, then `close`, even after an error."""
        self.open(store, timeout, backend)
        try:
            yield self
        finally:
            self.close()

    def open(self, store: dist.Store | None = None, timeout: timedelta = DEFAULT_TIMEOUT, backend: str | None = None) -> None:
        """Make torch's default group and those of the axes; every rank calls it. An error undoes what was made before it.

        `store` is shared by all ranks and holds no keys of an earlier opening; a single rank needs none. `timeout` is that of a
        single collective in any group. `backend`: by default nccl on a GPU, else gloo.
        """
        assert store is not None or self.world_size == 1
        assert not dist.is_initialized()
        with ExitStack() as undo:
            undo.callback(_destroy_groups)
            dist.init_process_group(
                backend or ("nccl" if self.device.type == "cuda" else "gloo"),
                store=dist.HashStore() if store is None else store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
            )
            undo.callback(self._groups.clear)
            self._timeout = timeout
            self._groups[tuple(range(self.world_size))] = dist.group.WORLD
            if self.size("tensor") > 1:
                self._open_megatron(undo)
            for axis in get_args(Axis):
                for line in self._lines(axis):
                    self.group_of(line)
            self._undo = undo.pop_all()

    def at_close(self, undo: Callable[[], object]) -> None:
        """Have `close` call `undo` while the groups still exist, the last one given first. The layout is open."""
        self._undo.callback(undo)

    def close(self) -> None:
        """Undo everything process-wide: what `at_close` was given, meshes, Megatron's groups and torch's.

        An error in one of them keeps none of the others from being undone; it is raised at the end.
        """
        self._undo.close()

    def _open_megatron(self, undo: ExitStack) -> None:
        """Megatron's own groups: its cross-entropy over a sharded vocabulary takes the tensor-parallel one from there."""
        with quiet_megatron():
            from megatron.core import parallel_state  # takes seconds to import, and other layouts have no use for it

        undo.callback(parallel_state.destroy_model_parallel)
        minutes = self._timeout / timedelta(minutes=1)
        parallel_state.initialize_model_parallel(
            self.size("tensor"), self.size("pipeline"), distributed_timeout_minutes=minutes, create_gloo_process_groups=False
        )
        self._groups |= {tuple(line): dist.GroupMember.NON_GROUP_MEMBER for line in self._lines("tensor")}
        self._groups[tuple(self.ranks("tensor"))] = parallel_state.get_tensor_model_parallel_group()

    def _forget_mesh(self) -> None:
        self._mesh = None
        _forget_meshes()


def _parts(axis: Axis) -> tuple[str, ...]:
    return PRODUCTS.get(axis, (axis,))


def _stride(sizes: Mapping[str, int], axis: str) -> int:
    """The distance between ranks that are neighbours on `axis`."""
    return math.prod(sizes[faster] for faster in AXES[AXES.index(axis) + 1 :])


def _destroy_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _forget_meshes() -> None:
    """Empty DTensor's caches: they find an equal mesh of an earlier layout, whose groups no longer exist."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
