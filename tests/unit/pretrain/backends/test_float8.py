"""Where float8 is refused, and which layers it would take. That it computes well only a GPU with it can show."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import nn

from configs.errors import UserError
from pretrain.backends.float8 import check_float8, fits_float8


def with_torchao(patch: pytest.MonkeyPatch, installed: bool) -> None:
    patch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None) if installed else None)


@pytest.mark.parametrize(
    ("device", "capability", "installed", "message"),
    [
        ("cpu", None, True, "needs a GPU (this process has none); take bf16"),
        ("cpu", None, False, "needs a GPU (this process has none) and torchao (pip install torchao); take bf16"),
        ("cuda", (8, 0), True, "needs a GPU of compute capability 8.9 or higher (this one has 8.0); take bf16"),
        ("cuda", (9, 0), False, "needs torchao (pip install torchao); take bf16"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int] | None, installed: bool, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with_torchao(monkeypatch, installed)
    with pytest.raises(UserError) as caught:
        check_float8(torch.device(device))
    assert str(caught.value) == f"training.precision = 'fp8': {message}"


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
def test_gpus_with_float8_pass(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with_torchao(monkeypatch, True)
    check_float8(torch.device("cuda"))


def test_linear_layers_of_multiples_of_16_are_taken() -> None:
    assert fits_float8(nn.Linear(32, 48))
    assert not fits_float8(nn.Linear(32, 24))
    assert not fits_float8(nn.Linear(24, 32))
    assert not fits_float8(nn.Embedding(32, 32))
