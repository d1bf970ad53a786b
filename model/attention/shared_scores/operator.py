"""MHE-ADD's heads from one softmax matrix: an operator that supports autograd, autocast and torch.compile.

Without rotation after the embeddings, the heads of MHE-ADD differ only by a bias on each key, e^Q_i·k_j. So one matrix
P = exp(q kᵀ) serves them all: head_i = Σ_j P w_i v_j / Σ_j P w_i + e^V_i with w_i[j] = exp(e^Q_i·k_j), one matrix product for
all heads. ALiBi is part of w_i, since −m(t − j) is m·j up to a term that cancels. docs/attention.md derives it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.attention.shared_scores import blocks, triton_calls
from model.positions.masks import AttentionMask

Results = TypeVar("Results", bound=tuple[Tensor, ...])
logger = logging.getLogger(__name__)
_failed: set[tuple[torch.device, torch.dtype, int]] = set()  # where a Triton kernel did not compile or launch


def shared_scores(
    q_BSD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    e_query_ND: Tensor,
    e_value_ND: Tensor,
    *,
    scale: float,
    slopes_N: Tensor | None = None,
    mask: AttentionMask | None = None,
) -> Tensor:
    """softmax(scale · (q + e^Q_i) kᵀ − m_i · distance) v + e^V_i of every head i: (S, B, N, D).

    The queries are the last S ≥ 1 of the T tokens. No gradient flows to the slopes, and there are no second derivatives. q, k
    and v have one type: float32, bfloat16 or, on CPUs, float64. TypeError for others: weights span e^±64, which float16 cannot
    represent. ValueError for shapes that do not match.
    """
    mask = mask or AttentionMask()
    tensors = [q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND]
    device = q_BSD.device.type
    if torch.is_autocast_enabled(device) and q_BSD.dtype != torch.float64:
        tensors = [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    _check(tensors, slopes_N, mask)
    heads_SBND, _, _ = _forward(*tensors, slopes_N, mask.valid_BT, mask.documents_BT, scale, mask.causal)
    return heads_SBND


def _check(tensors: list[Tensor], slopes_N: Tensor | None, mask: AttentionMask) -> None:
    """Check types and shapes: the kernels would read past the end of a tensor that is too short."""
    q_BSD, k_BTD, v_BTD, e_query_ND, e_value_ND = tensors
    if q_BSD.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"shared scores need float32 or bfloat16, not {q_BSD.dtype}: weights span e^±64")
    if not q_BSD.dtype == k_BTD.dtype == v_BTD.dtype:
        raise TypeError(f"q, k and v must have one type, not {q_BSD.dtype}, {k_BTD.dtype} and {v_BTD.dtype}")
    (batch, queries, width), keys, heads = q_BSD.shape, k_BTD.shape[1], e_query_ND.shape[0]
    if not 1 <= queries <= keys:
        raise ValueError(f"{queries} queries and {keys} keys: the queries are the last of as many keys or more, at least one")
    expected = {
        "k": (k_BTD, (batch, keys, width)),
        "v": (v_BTD, (batch, keys, width)),
        "e_query": (e_query_ND, (heads, width)),
        "e_value": (e_value_ND, (heads, width)),
        "slopes": (slopes_N, (heads,)),
        "mask.valid": (mask.valid_BT, (batch, keys)),
        "mask.documents": (mask.documents_BT, (batch, keys)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; with q {tuple(q_BSD.shape)} it must be {shape}")


def runs_on_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the Triton kernels run this; otherwise blocks.py does, on torch's own operators.

    They need CUDA, a type and a width that they support, and that none of them failed to compile or launch for these before.
    """
    return _supports(device, dtype, head_dim) and (device, dtype, head_dim) not in _failed


def _supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    fits = dtype in (torch.float32, torch.bfloat16) and head_dim <= triton_calls.MAX_HEAD_DIM
    return device.type == "cuda" and fits and triton_calls.is_available(device)


def _logarithms(q_BSD: Tensor) -> torch.dtype:
    """The type of logarithms between the passes.

    A graph compiled before a kernel fails relies on it, so a failure does not change it.
    """
    return torch.float32 if _supports(q_BSD.device, q_BSD.dtype, q_BSD.shape[2]) else blocks.LOGARITHMS


def _on_triton(q_BSD: Tensor, call: Callable[[], Results]) -> Results | None:
    """What the kernels that `call` starts return; None if torch's operators are to run instead.

    Kernels that do not compile or launch are given up for this device, type and width, with one warning.
    """
    place = (q_BSD.device, q_BSD.dtype, q_BSD.shape[2])
    if not runs_on_triton(*place):
        return None
    try:
        with torch.cuda.device_of(q_BSD):
            return call()
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels, and torch's operators need memory, too
    except Exception as error:  # Triton's errors have no base class of their own
        _failed.add(place)
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
        where = f"{place[0]}, {str(place[1]).removeprefix('torch.')}, head_dim {place[2]}"
        logger.warning("shared scores: the Triton kernels fail on %s; torch's operators, slower, take over. %s", where, reason)
        return None


def _keeps_context(q_BSD: Tensor) -> bool:
    """Whether to save A_i v in addition to A_i v + e^V_i for the backward pass.

    Recovered from the sum in bf16, A_i v has a rounding error of e^V's size, even for a head that attends to a single key and
    has none otherwise.
    """
    return q_BSD.dtype == torch.bfloat16


@torch.library.custom_op("manyheads::shared_scores", mutates_args=())
def _forward(
    q_BSD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    e_query_ND: Tensor,
    e_value_ND: Tensor,
    slopes_N: Tensor | None,
    valid_BT: Tensor | None,
    documents_BT: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads (S, B, N, D), the same without e^V if `_keeps_context`, and log Σ_j exp of their scores (S, B, N)."""
    keeps_context = _keeps_context(q_BSD)
    added_ND = torch.zeros_like(e_value_ND) if keeps_context else e_value_ND
    inputs = (q_BSD, k_BTD, v_BTD, e_query_ND, added_ND, slopes_N)
    with torch.autocast(q_BSD.device.type, enabled=False):
        found = _on_triton(q_BSD, lambda: triton_calls.forward(*inputs, valid_BT, documents_BT, scale, causal))
        heads_SBND, lse_SBN = found or blocks.forward(*inputs, AttentionMask(causal, valid_BT, documents_BT), scale)
        lse_SBN = lse_SBN.to(_logarithms(q_BSD))
        if keeps_context:
            return (heads_SBND + e_value_ND).to(heads_SBND.dtype), heads_SBND, lse_SBN
    return heads_SBND, heads_SBND.new_empty(0), lse_SBN


@_forward.register_fake
def _(
    q_BSD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    e_query_ND: Tensor,
    e_value_ND: Tensor,
    slopes_N: Tensor | None,
    valid_BT: Tensor | None,
    documents_BT: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads_SBND = q_BSD.new_empty(q_BSD.shape[1], q_BSD.shape[0], *e_query_ND.shape)
    context_SBND = torch.empty_like(heads_SBND) if _keeps_context(q_BSD) else heads_SBND.new_empty(0)
    return heads_SBND, context_SBND, heads_SBND.new_empty(heads_SBND.shape[:3], dtype=_logarithms(q_BSD))


@torch.library.custom_op("manyheads::shared_scores_backward", mutates_args=())
def _backward(
    d_heads_SBND: Tensor,
    q_BSD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    e_query_ND: Tensor,
    e_value_ND: Tensor,
    slopes_N: Tensor | None,
    valid_BT: Tensor | None,
    documents_BT: Tensor | None,
    scale: float,
    causal: bool,
    kept_SBND: Tensor,
    lse_SBN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, e^Q, e^V; `kept_SBND` is A_i v if `_keeps_context`, else the heads."""
    added_ND = torch.zeros_like(e_value_ND) if _keeps_context(q_BSD) else e_value_ND
    inputs = (q_BSD, k_BTD, v_BTD, e_query_ND, added_ND, slopes_N)
    outputs = (kept_SBND, lse_SBN)
    with torch.autocast(q_BSD.device.type, enabled=False):
        masks = (valid_BT, documents_BT)
        found = _on_triton(q_BSD, lambda: triton_calls.backward(d_heads_SBND, *inputs, *masks, *outputs, scale, causal))
        return found or blocks.backward(d_heads_SBND, *inputs, AttentionMask(causal, *masks), scale, *outputs)


@_backward.register_fake
def _(d_heads_SBND: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal = inputs
    heads_SBND, context_SBND, lse_SBN = output
    kept_SBND = context_SBND if _keeps_context(heads_SBND) else heads_SBND
    ctx.save_for_backward(*tensors, kept_SBND, lse_SBN)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_heads_SBND: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, kept_SBND, lse_SBN = ctx.saved_tensors
    if d_heads_SBND is None:
        return (None,) * 10
    gradients = _backward(d_heads_SBND.contiguous(), *tensors, ctx.scale, ctx.causal, kept_SBND, lse_SBN)
    return (*gradients, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
