"""Objectives by the kind of model that learns them: the only place that tells them apart. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import Config
from configs.targets import load_target

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

_OF_KIND = {"decoder": "pretrain.objectives.next_token:NextToken"}  # "module:Class" by `model.kind`


def make_objective(config: Config) -> Objective:
    """What the model of a resolved configuration learns."""
    objective: type[Objective] = load_target(_OF_KIND[config.model.kind])
    return objective(config)
