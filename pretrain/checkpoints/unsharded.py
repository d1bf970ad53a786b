"""A checkpoint's weights and optimizer state unsharded, on the CPU and without an engine, whatever layout wrote them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.build import unsharded_shapes
from pretrain.checkpoints.files import Reader
from pretrain.checkpoints.folder import ENGINE_FOLDER, read_config, read_state
from pretrain.checkpoints.state import WEIGHTS, State
from pretrain.optim.groups import kept_by_name


class Weights:
    """The model's float32 weights by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """UserError where the files do not hold the parameters of its config.yaml."""
        self.shapes = unsharded_shapes(read_config(folder).model)
        self._reader = Reader(folder / ENGINE_FOLDER)
        self._reader.check({WEIGHTS: self.shapes})

    def __call__(self, name: str) -> Tensor:
        return self._reader.read(WEIGHTS, name)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's weights by name. UserError where its files do not hold them."""
    weights = Weights(folder)
    return {name: weights(name) for name in weights.shapes}


def load_state(folder: Path) -> State:
    """Weights and the optimizer's state, in CPU memory. UserError for files without them."""
    config, reader = read_config(folder), Reader(folder / ENGINE_FOLDER)
    shapes = unsharded_shapes(config.model)
    kept = kept_by_name({name: len(shape) for name, shape in shapes.items()}, config.optimizer)
    kinds = {WEIGHTS: shapes}
    for name, shape in shapes.items():
        for kind in kept[name].states:
            kinds.setdefault(kind, {})[name] = shape
    reader.check(kinds)
    tensors = {kind: {name: reader.read(kind, name) for name in of_kind} for kind, of_kind in kinds.items()}
    state = State.unsharded(tensors, {name: torch.tensor(0.0) for of_one in kept.values() for name in of_one.scalars})
    state.set_scalars(read_state(folder).scalars)
    return state


def weight_files(folder: Path) -> list[str]:
    """The files that `load_weights` reads, relative to the checkpoint."""
    return [str(path.relative_to(folder)) for path in Reader(folder / ENGINE_FOLDER).files(WEIGHTS)]
