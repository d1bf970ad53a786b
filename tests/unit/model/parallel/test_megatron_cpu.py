"""megatron-core without a GPU: what is patched, and the random states of its tracker."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from model.parallel.megatron_cpu import CPURNGStatesTracker, install

REPLACED: list[tuple[Any, str]] = [
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (megatron_random, "CudaRNGStatesTracker"),
    (megatron_random, "_get_cuda_rng_state"),
    (megatron_random, "_set_cuda_rng_state"),
]


@pytest.mark.parametrize("gpu", [True, False])
def test_replaces_only_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    before = object()
    for owner, name in REPLACED:
        monkeypatch.setattr(owner, name, before)
    others = {name: value for name, value in vars(megatron_random).items() if (megatron_random, name) not in REPLACED}
    install()
    assert [getattr(owner, name) is before for owner, name in REPLACED] == [gpu] * len(REPLACED)
    assert {name: vars(megatron_random)[name] for name in others} == others
    if not gpu:
        assert torch.cuda.current_device() == torch.device("cpu")


def draw() -> list[float]:
    return torch.rand(3).tolist()


def test_states_advance_inside_and_leave_the_generator_alone() -> None:
    tracker = CPURNGStatesTracker()
    tracker.add("one", 5)
    tracker.add("two", 6)
    torch.manual_seed(1)
    with tracker.fork("one"):
        first = draw()
    outside = draw()
    with tracker.fork("two"):
        assert draw() == torch.rand(3, generator=torch.Generator().manual_seed(6)).tolist()
    with tracker.fork("one"):
        second = draw()
    alone = torch.Generator().manual_seed(5)
    assert [first, second] == [torch.rand(3, generator=alone).tolist() for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    assert [outside, draw()] == [torch.rand(3, generator=generator).tolist() for _ in range(2)]


def test_adding_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    CPURNGStatesTracker().add("one", 5)
    assert draw() == torch.rand(3, generator=torch.Generator().manual_seed(1)).tolist()


def test_states_can_be_set_back() -> None:
    tracker = CPURNGStatesTracker()
    tracker.add("one", 5)
    states = tracker.get_states()
    with tracker.fork("one"):
        first = draw()
    tracker.set_states(states)
    with tracker.fork("one"):
        assert draw() == first


@pytest.mark.parametrize(("name", "seed"), [("one", 6), ("two", 5)])
def test_refuses_names_and_seeds_that_are_taken(name: str, seed: int) -> None:
    tracker = CPURNGStatesTracker()
    tracker.add("one", 5)
    with pytest.raises(RuntimeError, match=f"{name} or seed {seed} already exists"):
        tracker.add(name, seed)


def test_an_error_inside_restores_the_generator() -> None:
    tracker = CPURNGStatesTracker()
    tracker.add("one", 5)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), tracker.fork("one"):
        raise ZeroDivisionError
    assert draw() == torch.rand(3, generator=torch.Generator().manual_seed(1)).tolist()
