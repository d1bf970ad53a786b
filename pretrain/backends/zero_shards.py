"""How ZeRO 1 to 3 cut weights and optimizer state over data-parallel ranks: read DeepSpeed's files on any number of ranks.

A *piece* is what ZeRO cuts at once into equal parts, the last of them filled up: all parameters of an optimizer group one
behind the other (stages 1 and 2), or one parameter (stage 3). A rank's *vector* holds its part of every piece of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from pretrain.checkpoint import load_tensors
from pretrain.parallel import World


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
    def of_group(cls, sizes: Iterable[int], vector: Tensor) -> Cut:
        """Stages 1 and 2: all parameters together, by the vector of one rank."""
        return cls((sum(sizes),), (vector.numel(),))


def repartition(vectors: Sequence[Tensor], old: Cut, new: Cut, rank: int) -> Tensor:
    """The vector that `rank` holds by `new`, from the vectors of all ranks by `old`; zeros where a piece is filled up."""
    out = vectors[0].new_zeros(sum(new.parts))
    old_offset = new_offset = 0
    for size, old_part, new_part in zip(new.pieces, old.parts, new.parts, strict=True):
        position, end = min(rank * new_part, size), min((rank + 1) * new_part, size)
        while position < end:
            source, within = divmod(position, old_part)
            count = min(old_part - within, end - position)
            target = new_offset + position - rank * new_part
            out[target : target + count] = vectors[source][old_offset + within :][:count]
            position += count
        old_offset, new_offset = old_offset + old_part, new_offset + new_part
    return out


@dataclass(frozen=True)
class GroupState:
    """One optimizer group of a model-parallel rank as its data-parallel ranks wrote it, a vector of each."""

    weights: tuple[Tensor, ...]  # fp32 masters
    moments: dict[str, tuple[Tensor, ...]]
    scalars: dict[str, Any]  # the number of steps


def read_states(folder: Path, model_rank: int, safe_classes: Sequence[type]) -> list[GroupState]:
    """The state of every optimizer group. UserError for what is no optimizer state of ZeRO 1 to 3.

    `safe_classes` are those of DeepSpeed's that its files hold beside tensors.
    """
    states = [_read_state(path, safe_classes) for path in state_files(folder, model_rank)]
    if not states:
        raise UserError(f"{folder}: holds no optimizer state of DeepSpeed ZeRO for model-parallel rank {model_rank}")
    groups = []
    for group, weights in enumerate(zip(*(weights for weights, _ in states), strict=True)):
        inner = [state["state"].get(group, {}) for _, state in states]
        vectors = [name for name, value in inner[0].items() if torch.is_tensor(value) and value.ndim == 1]
        moments = {name: tuple(state[name] for state in inner) for name in vectors}
        groups.append(GroupState(weights, moments, {name: value for name, value in inner[0].items() if name not in vectors}))
    return groups


def state_files(folder: Path, model_rank: int) -> list[Path]:
    """The files of all data-parallel ranks, in their order."""
    found = list(folder.glob(f"*zero_pp_rank_*_mp_rank_{model_rank:02d}_optim_states.pt"))
    return sorted(found, key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]))


def _read_state(path: Path, safe_classes: Sequence[type]) -> tuple[list[Tensor], dict[str, Any]]:
    """A rank's vectors of master weights, and the state dict of its optimizer."""
    content = load_tensors(path, safe_classes, mapped=True)
    try:
        state = content["optimizer_state_dict"]
        if "fp32_flat_groups" in state:
            return state["fp32_flat_groups"], state["optimizer_state_dict"]
        return state["single_partition_of_fp32_groups"], state["base_optimizer_state"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no optimizer state of DeepSpeed ZeRO") from error


def restore_optimizer(optimizer: Any, groups: list[GroupState], world: World) -> None:
    """Give one of DeepSpeed's ZeRO optimizers, and the model that it holds, this rank's part of a saved state.

    Hyperparameters stay those of this run. UserError where the state belongs to other parameters.
    """
    masters, sizes, sharded = _masters(optimizer)
    if len(masters) != len(groups):
        raise UserError(f"the checkpoint has {len(groups)} groups of parameters, this run {len(masters)}")
    if sharded:
        optimizer.checkpoint_event_prologue()
    for number, (master, numels, group) in enumerate(zip(masters, sizes, groups, strict=True)):
        if sharded:
            old = Cut.of_parameters(numels, len(group.weights))
            new = Cut.of_parameters(numels, world.data_size)
        else:
            # Masters may be written without what fills up the last part; moments are written with it.
            parts = next(iter(group.moments.values()), group.weights)
            old, new = Cut.of_group(numels, parts[0]), Cut.of_group(numels, master)
        try:
            master.data.copy_(repartition(group.weights, old, new, world.data_rank))
            optimizer.optimizer.state[master] = {
                **{name: value.clone() if torch.is_tensor(value) else value for name, value in group.scalars.items()},
                **{name: repartition(m, old, new, world.data_rank).to(master) for name, m in group.moments.items()},
            }
        except (RuntimeError, IndexError) as error:
            raise UserError(f"the checkpoint's group {number} of parameters does not fit this run's ({error})") from error
        if sharded:
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
    if sharded:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def _masters(optimizer: Any) -> tuple[list[Tensor], list[list[int]], bool]:
    """This rank's fp32 vectors, the parameters' numbers of values for each, and whether it is stage 3."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        sizes = [[parameter.ds_numel for parameter in group] for group in optimizer.fp16_groups]
        return optimizer.fp32_partitioned_groups_flat, sizes, True
    bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    masters = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
    groups = optimizer.bf16_groups if bf16 else optimizer.round_robin_bit16_groups
    return masters, [[parameter.numel() for parameter in group] for group in groups], False


def whole_weights(groups: list[GroupState], shapes: Sequence[Mapping[str, torch.Size]]) -> dict[str, Tensor]:
    """Stage 3: every parameter by name; `shapes` are those of each group's parameters in their order."""
    weights: dict[str, Tensor] = {}
    for group, of_group in zip(groups, shapes, strict=True):
        sizes = [shape.numel() for shape in of_group.values()]
        old, new = Cut.of_parameters(sizes, len(group.weights)), Cut.of_parameters(sizes, 1)
        parts = repartition(group.weights, old, new, rank=0).split(sizes)
        weights |= {name: part.view(shape) for (name, shape), part in zip(of_group.items(), parts, strict=True)}
    return weights
