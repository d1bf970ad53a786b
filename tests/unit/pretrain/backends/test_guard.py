"""An optimizer behind a guard: it steps if the step is accepted, which is asked once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pretrain.backends.base import finite
from pretrain.backends.guard import Guard


class Accepts:
    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.asked: list[tuple[float, float]] = []

    def __call__(self, grad_norm: float, loss: Callable[[], float]) -> bool:
        self.asked.append((grad_norm, loss()))
        return self.answer


def guarded() -> tuple[torch.nn.Parameter, torch.optim.Optimizer, Guard]:
    weight = torch.nn.Parameter(torch.ones(()))
    weight.grad = torch.ones(())
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    return weight, optimizer, Guard(optimizer, lambda: 3.0, lambda: 2.0)


@pytest.mark.parametrize("answer", [True, False])
def test_all_groups_of_a_step_get_the_same_answer(answer: bool) -> None:
    weight, optimizer, guard = guarded()
    guard.begin(accepts := Accepts(answer))
    optimizer.step()
    optimizer.step()  # a second group
    assert accepts.asked == [(3.0, 2.0)]
    assert guard.accepted() is answer
    assert (weight.item() < 1, len(optimizer.state)) == (answer, int(answer))


def test_each_step_is_asked_anew() -> None:
    weight, optimizer, guard = guarded()
    guard.begin(Accepts(False))
    optimizer.step()
    guard.begin(accepts := Accepts(True))
    optimizer.step()
    assert accepts.asked == [(3.0, 2.0)]
    assert float(optimizer.state[weight]["step"]) == 1


def test_a_step_that_the_engine_never_takes_is_asked_at_its_end() -> None:
    _, _, guard = guarded()
    guard.begin(accepts := Accepts(False))
    assert not guard.accepted()
    assert (accepts.asked, guard.grad_norm) == ([(3.0, 2.0)], 3.0)


def test_gradients_that_are_finite_are_accepted() -> None:
    assert [finite(norm, lambda: 0.0) for norm in (1.0, 0.0, math.inf, math.nan)] == [True, True, False, False]
