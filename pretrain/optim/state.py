"""An optimizer's state of one parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEP = "step"  # how often a parameter has been stepped


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of `kinds` and the number of steps, by name; made, as the first step would do it, if there is none yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state.update({STEP: torch.zeros((), device=parameter.device), **{kind: torch.zeros_like(parameter) for kind in kinds}})
    return state
