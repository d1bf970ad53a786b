"""An optimizer's state of one parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.optim.registry import Kept

KEPT = "kept"  # under this key each of torch's `param_groups` has its Kept


def kept_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, Kept]:
    """What the optimizer keeps of each of its parameters."""
    return {parameter: group[KEPT] for group in optimizer.param_groups for parameter in group["params"]}


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: Tensor, kept: Kept) -> dict[str, Tensor]:
    """The states and scalars of `kept` by name; made, as the first step would do it, if there are none yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state.update({name: torch.full((), value, device=parameter.device) for name, value in kept.scalars.items()})
        state.update({kind: torch.zeros_like(parameter) for kind in kept.states})
    return state
