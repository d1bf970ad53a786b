"""Models of any kind from a resolved configuration, their rows and the shapes of their parameters."""

from __future__ import annotations

import torch

from configs.schema import ModelConfig
from model.layers import UNSHARDED, Layers
from model.registry import model_class
from model.row import RowLayer, RowModel


def build_model(config: ModelConfig, layers: Layers = UNSHARDED, recompute_activations: bool = False) -> RowModel:
    """The model of a resolved configuration; arguments as for `RowModel`."""
    model: RowModel = model_class(config.kind)(config, layers, recompute_activations)
    return model


def model_row(config: ModelConfig, layers: Layers = UNSHARDED) -> list[RowLayer]:
    """The layers of a resolved configuration's model; builds no modules."""
    row: list[RowLayer] = model_class(config.kind).describe(config, layers)
    return row


def unsharded_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The unsharded shape of every parameter of a resolved model, by name."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in build_model(config).named_parameters()}
