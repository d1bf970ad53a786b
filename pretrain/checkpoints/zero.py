"""How ZeRO 1 to 3 cut weights and optimizer state over data-parallel ranks: read DeepSpeed's files on any number of ranks.

A *piece* is what ZeRO cuts at once into equal parts, the last of them filled up: all parameters of an optimizer group one
behind the other (stages 1 and 2), or one parameter (stage 3). A rank's *vector* holds its part of every piece of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.errors import UserError
from pretrain.checkpoints.portable import MOMENTS, Kind, WholeFile
from pretrain.checkpoints.store import load_tensors
from pretrain.distributed.layout import Layout


class Vector(Protocol):
    """A flat tensor, or what gives parts of one."""

    def numel(self) -> int: ...

    def __getitem__(self, span: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Cut:
    """A group's pieces, by number of values; `parts` is how many of each a rank's vector holds."""

    pieces: tuple[int, ...]
    parts: tuple[int, ...]

    @classmethod
    def of_parameters(cls, sizes: Iterable[int], ranks: int) -> Cut:
        """Stage 3: every parameter alone."""
        pieces = tuple(sizes)
        return cls(pieces, tuple(math.ceil(size / ranks) for size in pieces))

    @classmethod
    def of_group(cls, sizes: Iterable[int], vector: Vector) -> Cut:
        """Stages 1 and 2: all parameters together, by the vector of one rank."""
        return cls((sum(sizes),), (vector.numel(),))


def repartition(vectors: Callable[[int], Vector], old: Cut, new: Cut, rank: int) -> Tensor:
    """The vector that `rank` holds by `new`, from those of the ranks by `old` that have some of it; zeros as filling.

    ValueError where a vector is not as long as `old` says.
    """
    out = torch.zeros(sum(new.parts))
    old_offset = new_offset = 0
    for size, old_part, new_part in zip(new.pieces, old.parts, new.parts, strict=True):
        position, end = min(rank * new_part, size), min((rank + 1) * new_part, size)
        while position < end:
            source, within = divmod(position, old_part)
            count = min(old_part - within, end - position)
            found = vectors(source)[old_offset + within : old_offset + within + count]
            if found.numel() < count:
                raise ValueError(f"rank {source}'s vector has {vectors(source).numel()} values, {sum(old.parts)} are expected")
            target = new_offset + position - rank * new_part
            out[target : target + count] = found
            position += count
        old_offset, new_offset = old_offset + old_part, new_offset + new_part
    return out


class StateFiles:
    """The optimizer state of a model-parallel rank as its data-parallel ranks wrote it; files are opened when asked for."""

    def __init__(self, folder: Path, model_rank: int, safe_classes: Sequence[type]) -> None:
        """`safe_classes` are those of DeepSpeed's that the files hold beside tensors. UserError where one is missing."""
        self.paths, self.safe_classes = state_files(folder, model_rank), safe_classes
        self.opened: dict[int, tuple[list[Tensor], dict[str, Any]]] = {}
        self.ranks = len(self.paths)
        wrong = [rank for rank, path in enumerate(self.paths) if _rank_of(path) != rank]
        if wrong or not self.paths:
            missing = f"that of data-parallel rank {wrong[0] if wrong else 0} of model-parallel rank {model_rank} is missing"
            raise UserError(f"{folder}: optimizer states of DeepSpeed ZeRO: {missing}")

    def weights(self, group: int) -> Callable[[int], Tensor]:
        """Rank → its vector of fp32 master weights of an optimizer group."""
        return lambda rank: self._state(rank)[0][group]

    def moments(self, group: int, name: str) -> Callable[[int], Tensor]:
        """Rank → its vector of that name in the state of an optimizer group."""
        return lambda rank: self._state(rank)[1]["state"][group][name]

    def groups(self, rank: int) -> list[dict[str, Any]]:
        """What a rank has of each group beside master weights: moments, and scalars such as the number of steps."""
        weights, inner = self._state(rank)
        return [inner["state"].get(group, {}) for group in range(len(weights))]

    def _state(self, rank: int) -> tuple[list[Tensor], dict[str, Any]]:
        if rank not in self.opened:
            if rank >= self.ranks:
                raise ValueError(f"there is no data-parallel rank {rank}, only {self.ranks} have written")
            self.opened[rank] = _read_state(self.paths[rank], self.safe_classes)
        return self.opened[rank]


class WholeStates:
    """A portable checkpoint as if a single data-parallel rank had written it as StateFiles."""

    ranks = 1

    def __init__(self, file: WholeFile, groups: Sequence[Mapping[str, torch.Size]]) -> None:
        """`groups` are the optimizer's parameters in their order: unsharded names, and shapes on this rank."""
        self.file, self.shapes = file, groups

    def weights(self, group: int) -> Callable[[int], Vector]:
        return lambda rank: _Row(self.file, "model", self.shapes[group])

    def moments(self, group: int, name: Kind) -> Callable[[int], Vector]:
        return lambda rank: _Row(self.file, name, self.shapes[group])

    def groups(self, rank: int) -> list[dict[str, Any]]:
        return [
            {"step": self.file.step, **{name: self.moments(group, name)(rank) for name in MOMENTS}}
            for group in range(len(self.shapes))
        ]


class _Row:
    """Parameters or moments laid end to end; only what is sliced is read."""

    ndim = 1

    def __init__(self, file: WholeFile, kind: Kind, shapes: Mapping[str, torch.Size]) -> None:
        self.file, self.kind, self.shapes = file, kind, shapes

    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def __getitem__(self, span: slice, /) -> Tensor:
        start, stop, _ = span.indices(self.numel())
        parts, before = [torch.zeros(0)], 0
        for name, shape in self.shapes.items():
            first, last = max(start - before, 0), min(stop - before, shape.numel())
            if first < last:
                parts.append(self.file.shard(self.kind, name, shape).flatten()[first:last])
            before += shape.numel()
        return torch.cat(parts)


def state_files(folder: Path, model_rank: int) -> list[Path]:
    """The files of all data-parallel ranks, in their order."""
    return sorted(folder.glob(f"*zero_pp_rank_*_mp_rank_{model_rank:02d}_optim_states.pt"), key=_rank_of)


def _rank_of(path: Path) -> int:
    return int(path.name.partition("pp_rank_")[2].partition("_")[0])


def _read_state(path: Path, safe_classes: Sequence[type]) -> tuple[list[Tensor], dict[str, Any]]:
    """A rank's vectors of master weights, and the state dict of its optimizer."""
    content = load_tensors(path, safe_classes, mapped=True)
    try:
        state = content["optimizer_state_dict"]
        stage_3 = "fp32_flat_groups" in state
        weights = state["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"]
        inner = state["optimizer_state_dict" if stage_3 else "base_optimizer_state"]
        if isinstance(inner["state"], dict) and all(torch.is_tensor(vector) for vector in weights):
            return weights, inner
    except (KeyError, TypeError):
        pass
    raise UserError(f"{path}: holds no optimizer state of DeepSpeed ZeRO")


def restore_optimizer(optimizer: Any, states: StateFiles | WholeStates, layout: Layout) -> None:
    """Give one of DeepSpeed's ZeRO optimizers, and the model that it holds, this rank's part of a saved state.

    Hyperparameters stay those of this run. UserError where the state belongs to other parameters.
    """
    masters, sizes, sharded = _masters(optimizer)
    groups = states.groups(min(layout.coordinate("data"), states.ranks - 1))
    if len(masters) != len(groups):
        raise UserError(f"the checkpoint has {len(groups)} groups of parameters, this run {len(masters)}")
    if sharded:
        optimizer.checkpoint_event_prologue()
    for number, (master, numels, group) in enumerate(zip(masters, sizes, groups, strict=True)):
        moments: list[Any] = [name for name, value in group.items() if getattr(value, "ndim", 0) == 1]
        try:
            if sharded:
                old = Cut.of_parameters(numels, states.ranks)
                new = Cut.of_parameters(numels, layout.size("data"))
            else:  # by a moment, since masters may be written without what fills up the last part
                old, new = Cut.of_group(numels, group[moments[0]]), Cut.of_group(numels, master)
            master.data.copy_(repartition(states.weights(number), old, new, layout.coordinate("data")))
            vectors = {name: repartition(states.moments(number, name), old, new, layout.coordinate("data")) for name in moments}
        except (RuntimeError, IndexError, KeyError, ValueError) as error:
            raise UserError(f"the checkpoint's group {number} of parameters does not fit this run's ({error})") from error
        optimizer.optimizer.state[master] = {
            name: vectors[name].to(master) if name in vectors else _on(value, master) for name, value in group.items()
        }
        if sharded:
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    if sharded:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def _on(scalar: Any, master: Tensor) -> Any:
    """A copy for the optimizer, whose fused kernel wants the number of steps where the vectors are."""
    return scalar.to(master.device, copy=True) if torch.is_tensor(scalar) else scalar


def _masters(optimizer: Any) -> tuple[list[Tensor], list[list[int]], bool]:
    """This rank's fp32 vectors, the parameters' numbers of values for each, and whether it is stage 3."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        sizes = [[parameter.ds_numel for parameter in group] for group in optimizer.fp16_groups]
        return optimizer.fp32_partitioned_groups_flat, sizes, True
    bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    masters = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    groups = optimizer.bf16_groups if bf16 else optimizer.round_robin_bit16_groups
    return masters, [[parameter.numel() for parameter in group] for group in groups], False


class WholeParameters:
    """Stage 3: every parameter's fp32 master weights, or a moment of them, by name, each joined when it is asked for."""

    def __init__(self, states: StateFiles, shapes: Sequence[Mapping[str, torch.Size]], kind: Kind = "model") -> None:
        """`shapes` are those of each group in their order."""
        self.states, self.kind = states, kind
        self.places: dict[str, tuple[int, int, int, torch.Size]] = {}
        for group, of_group in enumerate(shapes):
            offset = 0
            for name, shape in of_group.items():
                part = math.ceil(shape.numel() / states.ranks)
                self.places[name] = group, offset, part, shape
                offset += part

    def __call__(self, name: str) -> Tensor:
        """KeyError, ValueError or IndexError where the files are of other parameters."""
        group, offset, part, shape = self.places[name]
        vectors, parts = _vectors(self.states, group, self.kind), []
        for rank in range(math.ceil(shape.numel() / part)):
            end = offset + min(part, shape.numel() - rank * part)
            vector = vectors(rank)
            if vector.numel() < end:
                raise ValueError(f"rank {rank}'s vector has {vector.numel()} values, {end} are expected for {name}")
            parts.append(vector[offset:end])
        return torch.cat(parts).view(shape)


def whole_tensors(
    states: StateFiles, shapes: Sequence[Mapping[str, torch.Size]], stage: int, kind: Kind = "model"
) -> dict[str, Tensor]:
    """Every parameter's fp32 master weights, or a moment of them, by name; `shapes` are those of each group in their order.

    ValueError or IndexError where the files are of other parameters.
    """
    if stage == 3:
        whole = WholeParameters(states, shapes, kind)
        return {name: whole(name) for name in whole.places}
    tensors: dict[str, Tensor] = {}
    for number, of_group in enumerate(shapes):
        sizes = [shape.numel() for shape in of_group.values()]
        # Cut by a moment, since masters may be written without what fills up the last part.
        old, new = Cut.of_group(sizes, states.moments(number, "exp_avg")(0)), Cut((sum(sizes),), (sum(sizes),))
        parts = repartition(_vectors(states, number, kind), old, new, rank=0).split(sizes)
        tensors |= {name: part.view(shape) for (name, shape), part in zip(of_group.items(), parts, strict=True)}
    return tensors


def _vectors(states: StateFiles, group: int, kind: Kind) -> Callable[[int], Tensor]:
    return states.weights(group) if kind == "model" else states.moments(group, kind)
