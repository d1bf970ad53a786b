"""On GPUs shared scores are taken only where a measurement speaks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.attention import kernels, measured
from model.attention.kernels import choose
from model.attention.measured import Measurement, measured_faster

ENTRY = Measurement("H200", 16, 64, "docs/benchmarks/some.json")


@pytest.mark.parametrize(
    ("device", "heads", "head_dim", "found"),
    [
        ("NVIDIA H200", 64, 16, True),
        ("NVIDIA H200 NVL", 128, 16, True),
        ("NVIDIA GH200 480GB", 64, 16, False),
        ("NVIDIA H200", 63, 16, False),
        ("NVIDIA H200", 64, 32, False),
    ],
)
def test_entries(monkeypatch: pytest.MonkeyPatch, device: str, heads: int, head_dim: int, found: bool) -> None:
    assert measured_faster(device, heads, head_dim) is None
    monkeypatch.setattr(measured, "MEASURED", (ENTRY,))
    assert measured_faster(device, heads, head_dim) == (ENTRY if found else None)


@pytest.mark.parametrize("known", [False, True])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.setattr(kernels, "runs_on_triton", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(measured, "MEASURED", (ENTRY,) if known else ())
    sizes: dict[str, Any] = {"heads": 64, "head_dim": 16, "queries": 128, "keys": 128}
    choice = choose("auto", shares_scores=True, device=torch.device("cuda"), dtype=torch.bfloat16, **sizes)
    assert choice.kernel == ("shared_scores" if known else "sdpa")
    assert ("docs/benchmarks/some.json" if known else "no measurement") in choice.reason
