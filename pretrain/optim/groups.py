"""From a model's parameters to its optimizer: the same parameter groups in the same order on every rank and in every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from configs.schema import OptimizerConfig
from pretrain.optim.registry import Kept, optimizer_kind, optimizer_recipe
from pretrain.optim.state import KEPT

LR_SCALE = "lr_scale"  # under this key torch's `param_groups` have what their learning rate is multiplied by, if it is not 1


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share settings and kinds of state."""

    kind: str  # the group's name in the optimizer's entry
    names: tuple[str, ...]
    settings: Mapping[str, Any]  # what torch's `param_groups` hold for them


class Recipe(Protocol):
    """How one optimizer is made; named in pretrain/optim/registry.py."""

    def groups(self, dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
        """Each parameter in one group, in the order given; a group may be empty.

        `dimensions` is how many an unsharded parameter has, by its name in the unsharded model.
        """

    def build(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        """The optimizer of torch `param_groups`, each `{"params": …, **settings}`, which become its own `param_groups`."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    config: OptimizerConfig,
    dimensions: Callable[[torch.nn.Parameter], int] = torch.Tensor.dim,
    unsharded_name: Callable[[str], str] = str,
) -> torch.optim.Optimizer:
    """The optimizer of `optimizer.kind`; parameters are in the order of their names.

    `dimensions` and `unsharded_name` say what a parameter is in the unsharded model, where an engine hides it.
    """
    ordered = sorted(named_parameters, key=lambda pair: pair[0])
    parameters = {unsharded_name(name): parameter for name, parameter in ordered}
    groups = _groups({name: dimensions(parameter) for name, parameter in parameters.items()}, config)
    kept, recipe = optimizer_kind(config.kind).groups, optimizer_recipe(config.kind)
    torch_groups = [
        {"params": [parameters[name] for name in group.names], KEPT: kept[group.kind], **group.settings} for group in groups
    ]
    return recipe.build(torch_groups, config)


def set_learning_rate(param_groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Give each of torch's `param_groups` its learning rate for the next step."""
    for group in param_groups:
        group["lr"] = learning_rate * group.get(LR_SCALE, 1.0)


def kept_by_name(dimensions: Mapping[str, int], config: OptimizerConfig) -> dict[str, Kept]:
    """What the optimizer of `optimizer.kind` keeps of each parameter of the unsharded model."""
    kept = optimizer_kind(config.kind).groups
    return {name: kept[group.kind] for group in _groups(dimensions, config) for name in group.names}


def grouped_names(dimensions: Mapping[str, int], config: OptimizerConfig) -> list[tuple[str, ...]]:
    """The names of the parameters of each group; no group is empty."""
    return [group.names for group in _groups(dimensions, config)]


def _groups(dimensions: Mapping[str, int], config: OptimizerConfig) -> list[ParameterGroup]:
    groups = [group for group in optimizer_recipe(config.kind).groups(dimensions, config) if group.names]
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(dimensions), f"{config.kind}: not every parameter is in one group"
    return groups
