"""A Triton kernel that does not compile or launch: torch's operators take over, with one warning."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention.kernels import choose
from model.attention.shared_scores import blocks, operator, triton_calls
from model.positions.masks import AttentionMask

HERE = (torch.device("cpu"), torch.float32, 8)
INTERNAL = RuntimeError("PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr: …")


def leaves() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(2, 20, 8)] * 3 + [(5, 8)] * 2
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def step() -> list[Tensor]:
    """Heads and gradients."""
    tensors = leaves()
    heads_SBND = operator.shared_scores(*tensors, scale=8**-0.5)
    return [heads_SBND, *torch.autograd.grad(heads_SBND.cos().sum(), tensors)]


class Kernels:
    """Stands for the Triton kernels on this machine: `failing` raises `error`, the other pass works; counts calls."""

    def __init__(self, failing: str, error: Exception) -> None:
        self.failing, self.error, self.calls = failing, error, {"forward": 0, "backward": 0}

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND, slopes_N, valid_BT, documents_BT, scale, causal = arguments
        mask = AttentionMask(causal, valid_BT, documents_BT)
        self._count("forward")
        heads_SBND, lse_SBN = blocks.forward(q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND, slopes_N, mask, scale)
        return heads_SBND, lse_SBN.float()

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        self._count("backward")
        raise AssertionError("only a failing backward pass is tested here")

    def _count(self, name: str) -> None:
        self.calls[name] += 1
        if name == self.failing:
            raise self.error


def install(monkeypatch: pytest.MonkeyPatch, failing: str, error: Exception = INTERNAL) -> Kernels:
    found = Kernels(failing, error)
    monkeypatch.setattr(operator, "_supports", lambda *_: True)
    monkeypatch.setattr(operator, "_failed", set())
    for name in ("forward", "backward"):
        monkeypatch.setattr(triton_calls, name, getattr(found, name))
    return found


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_torchs_operators_take_over(failing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    expected = step()
    found = install(monkeypatch, failing)
    with caplog.at_level(logging.WARNING):
        results = [step(), step()]
    for result in results:
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found.calls == {"forward": 1, "backward": 0 if failing == "forward" else 1}, "they were tried again"
    (record,) = caplog.records
    message = record.getMessage()
    assert "Triton kernels fail on cpu, float32, head_dim 8" in message
    assert message.endswith("RuntimeError: PTXAS error: Internal Triton PTX codegen error")
    assert not operator.runs_on_triton(*HERE)
    assert operator.runs_on_triton(torch.device("cpu"), torch.float32, 16), "other widths are given up, too"


def test_a_graph_compiled_before_the_failure_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The type of the logarithms, which the graph relies on, is the kernels' before and after."""
    install(monkeypatch, "forward")
    tensors, rest = [tensor.detach() for tensor in leaves()], (None, None, None, 0.35, True)
    with torch._subclasses.FakeTensorMode() as mode:
        promised = operator._forward(*[mode.from_tensor(tensor) for tensor in tensors], *rest)
    for kept in (operator._forward(*tensors, *rest), operator._forward(*tensors, *rest)):
        assert [x.dtype for x in kept] == [x.dtype for x in promised]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_lack_of_memory_and_a_lost_gpu_are_no_fault_of_the_kernels(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "forward", error)
    with pytest.raises(type(error)):
        step()
    assert operator.runs_on_triton(*HERE)


def test_auto_does_not_choose_kernels_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_supports", lambda *_: True)
    monkeypatch.setattr(operator, "_failed", {(torch.device("cuda:0"), torch.bfloat16, 16)})
    sizes: dict[str, Any] = {"heads": 64, "head_dim": 16, "queries": 128, "keys": 128}
    choice = choose("auto", shares_scores=True, device=torch.device("cuda:0"), dtype=torch.bfloat16, **sizes)
    assert choice.kernel == "sdpa"
    assert "no Triton kernel" in choice.reason
