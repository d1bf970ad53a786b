"""Between an engine's gradients and its optimizer: a step that is not accepted changes neither weights nor state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pretrain.backends.base import Accepts, finite


class Guard:
    """Lets an optimizer step only if the step is accepted, which is asked once, when the optimizer is about to step.

    An engine calls the optimizer for one group of parameters after the other; all get the same answer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, measure: Callable[[], float], loss: Callable[[], float]) -> None:
        """`measure` gives the gradient norm of all ranks before clipping, `loss` this rank's share of the step's loss."""
        self._step, self._measure, self._loss = optimizer.step, measure, loss
        self._accepts: Accepts = finite
        self._accepted: bool | None = None
        self.grad_norm = math.inf
        optimizer.step = self._step_if_accepted  # type: ignore[method-assign]

    def begin(self, accepts: Accepts) -> None:
        """Before the forward pass: what decides on the coming step."""
        self._accepts, self._accepted = accepts, None

    def accepted(self) -> bool:
        """Whether the step is taken. Also to be asked after it: an engine that sees a norm of no use calls no optimizer."""
        if self._accepted is None:
            self.grad_norm = self._measure()
            self._accepted = self._accepts(self.grad_norm, self._loss)
        return self._accepted

    def _step_if_accepted(self, *arguments: Any, **options: Any) -> Any:
        return self._step(*arguments, **options) if self.accepted() else None
