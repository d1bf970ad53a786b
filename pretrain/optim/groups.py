"""From a model's parameters to its optimizer: the same parameter groups in the same order on every rank and in every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from configs.schema import OptimizerConfig
from pretrain.optim.registry import optimizer_recipe


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share settings: their names in order, and what torch's `param_groups` hold for them."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


class Recipe(Protocol):
    """How one optimizer is made; named in pretrain/optim/registry.py."""

    def groups(self, dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
        """Non-empty groups of parameters; `dimensions` is how many an unsharded parameter of that name has."""

    def build(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        """The optimizer of torch `param_groups`, each `{"params": …, **settings}`."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    config: OptimizerConfig,
    dimensions: Callable[[torch.nn.Parameter], int] = torch.Tensor.dim,
) -> torch.optim.Optimizer:
    """The optimizer of `optimizer.kind`. `dimensions` says how many an unsharded parameter has, where sharding hides it."""
    parameters = dict(named_parameters)
    recipe = optimizer_recipe(config.kind)
    groups = recipe.groups({name: dimensions(parameter) for name, parameter in parameters.items()}, config)
    return recipe.build([{"params": [parameters[name] for name in group.names], **group.settings} for group in groups], config)
