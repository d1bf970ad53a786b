"""A checkpoint's weights and optimizer state unsharded, on the CPU and without an engine, whatever layout wrote them."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from configs.errors import UserError
from model.build import unsharded_shapes
from pretrain.checkpoints.files import Reader
from pretrain.checkpoints.folder import ENGINE_FOLDER, read_config, read_state
from pretrain.checkpoints.state import AVERAGE, AVERAGED_STEPS, WEIGHTS, State, saved_kinds
from pretrain.optim.groups import kept_by_name

Which = Literal["trained", "average"]  # the weights that training goes on with, or their average


class Weights:
    """The model's float32 weights by name, each read when it is asked for; `label` says which they are."""

    def __init__(self, folder: Path, which: Which = "trained") -> None:
        """UserError where the files do not hold the parameters of its config.yaml, or no average of them."""
        self.shapes = unsharded_shapes(read_config(folder).model)
        self._reader = Reader(folder / ENGINE_FOLDER)
        self._kinds, self.label = _averaged(folder, self._reader.index.kinds, which)
        self._reader.check(dict.fromkeys(self._kinds, self.shapes))

    def __call__(self, name: str) -> Tensor:
        first, *others = self._kinds
        tensor = self._reader.read(first, name)
        if not others:
            return tensor
        total = tensor.double()
        for kind in others:
            total += self._reader.read(kind, name)
        return (total / len(self._kinds)).float()

    def files(self) -> list[Path]:
        """Those of the tensors, and the index."""
        return list(dict.fromkeys(path for kind in self._kinds for path in self._reader.files(kind)))


def _averaged(folder: Path, kinds: Set[str], which: Which) -> tuple[list[str], str]:
    """The kinds of tensors whose mean is asked for, and what that is in words."""
    if which == "trained":
        return [WEIGHTS], which
    average = read_config(folder).training.average
    if AVERAGE in kinds:
        return [AVERAGE], f"exponential average, decay {average.decay}"
    if average.last is None:
        raise UserError(
            f"{folder}: holds no average of the weights, since its run had no training.average; take the trained ones"
        )
    saves = [WEIGHTS, *saved_kinds(kinds)]
    return saves, f"average of {len(saves)} save{'s' * (len(saves) > 1)}"


def load_weights(folder: Path, which: Which = "trained") -> dict[str, Tensor]:
    """The model's weights by name. UserError where its files do not hold them."""
    weights = Weights(folder, which)
    return {name: weights(name) for name in weights.shapes}


def load_state(folder: Path) -> State:
    """Weights, the optimizer's state and averages, in CPU memory. UserError for files without the first two."""
    config, reader = read_config(folder), Reader(folder / ENGINE_FOLDER)
    shapes = unsharded_shapes(config.model)
    kept = kept_by_name({name: len(shape) for name, shape in shapes.items()}, config.optimizer)
    kinds = {WEIGHTS: shapes}
    for name, shape in shapes.items():
        for kind in kept[name].states:
            kinds.setdefault(kind, {})[name] = shape
    held = reader.index.kinds
    kinds |= dict.fromkeys([*({AVERAGE} & held), *saved_kinds(held)], shapes)
    reader.check(kinds)
    tensors = {kind: {name: reader.read(kind, name) for name in of_kind} for kind, of_kind in kinds.items()}
    stored = read_state(folder).scalars
    names = {name for of_one in kept.values() for name in of_one.scalars} | ({AVERAGED_STEPS} & stored.keys())
    state = State.unsharded(tensors, {name: torch.tensor(0.0) for name in names})
    state.set_scalars(stored)
    return state


def weight_files(folder: Path, which: Which = "trained") -> list[str]:
    """The files that `load_weights` reads, relative to the checkpoint."""
    return [str(path.relative_to(folder)) for path in Weights(folder, which).files()]
