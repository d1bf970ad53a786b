"""Selects an attention kernel, and holds the two that work for any heads: the math reference and torch's fused kernels.

`attend` serves every variant. MHE-ADD has a third kernel, model/attention/shared_scores/operator.py. docs/attention.md has the
measurements behind the selection.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configs.schema import ModelConfig
from model.attention.measured import measured_faster
from model.attention.shared_scores.operator import runs_on_triton
from model.heads import repeat_heads
from model.positions.positions import Positions

KERNELS = get_args(ModelConfig.model_fields["attention_kernel"].annotation)
FEWEST_QUERIES = 64
BESIDE = 8  # channels that are added for one, see `beside`
SCORES_AT_ONCE = 2**22  # of all heads, where they are materialized
FEWEST_IN_BLOCK = 128  # queries of a window's block: smaller ones do not fill a kernel
FEWEST_HEADS_TIMES_KEYS = 2000  # from here sharing pays on a CPU, where each sequence has about a millisecond of overhead
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A kernel, and why it was chosen."""

    kernel: str
    reason: str


def choose(
    wanted: str,
    *,
    shares_scores: bool,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    queries: int,
    keys: int,
    softcap: float | None = None,
    announces: bool = True,
) -> Choice:
    """The kernel for one attention call; `wanted` is config.attention_kernel.

    `shares_scores`: the heads differ only by a bias on keys. `announces`: each choice and its reason is logged once at level
    INFO.
    """
    if wanted not in KERNELS:
        raise ValueError(f"attention_kernel {wanted}: known: {', '.join(KERNELS)}")
    if wanted == "shared_scores" and not shares_scores:
        raise ValueError("attention_kernel shared_scores: these heads have scores of their own")
    if wanted != "auto":
        return Choice(wanted, "asked for by attention_kernel")
    if softcap is not None:
        choice = Choice("sdpa", "with a soft-cap, which no fused kernel takes, that is the formula by blocks of queries")
    elif not shares_scores:
        choice = Choice("sdpa", "heads have scores of their own, torch's fused kernels are fastest")
    elif queries < FEWEST_QUERIES:
        choice = Choice("sdpa", f"fewer than {FEWEST_QUERIES} queries, as when generating")
    elif device.type == "cpu":
        choice = _on_cpu(dtype, heads, keys)
    else:
        choice = _on_gpu(device, dtype, heads, head_dim)
    if announces and not torch.compiler.is_compiling():
        _announce(choice)
    return choice


def _on_cpu(dtype: torch.dtype, heads: int, keys: int) -> Choice:
    if dtype == torch.float16:
        return Choice("sdpa", "float16 cannot hold the weights of shared scores")
    if heads * keys < FEWEST_HEADS_TIMES_KEYS:
        return Choice("sdpa", f"heads times keys below {FEWEST_HEADS_TIMES_KEYS:,}, too small to gain")
    return Choice("shared_scores", "one softmax matrix serves all heads")


def _on_gpu(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> Choice:
    if not runs_on_triton(device, dtype, head_dim):
        return Choice("sdpa", f"no Triton kernel for {dtype} and head_dim {head_dim} on this device")
    found = measured_faster(torch.cuda.get_device_name(device), heads, head_dim)
    if found is None:
        return Choice("sdpa", "no measurement shows shared scores to be faster on this GPU")
    return Choice("shared_scores", f"one softmax matrix serves all heads, which was faster ({found.source})")


@lru_cache
def _announce(choice: Choice) -> None:
    logger.info("attention kernel %s: %s", choice.kernel, choice.reason)


def attend(
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    positions: Positions,
    *,
    scale: float,
    kernel: str = "auto",
    sinks_N1: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ − slope · distance) v over the visible keys, as (B, N, S, width of v).

    `sinks_N1`: the logit of each head that its softmax counts without a value. `softcap`: c of c · tanh(scale · q kᵀ / c).

    The S queries are the last S of the T tokens. K divides N: N/K neighbouring query heads read the same key and value head. A
    query that sees no key gives zeros. `kernel`: "math" evaluates the formula and stores S × T numbers for each head; "sdpa" or
    "auto" is torch's scaled_dot_product_attention.
    """
    choice = choose(
        kernel,
        shares_scores=False,
        device=q_BNSD.device,
        dtype=q_BNSD.dtype,
        heads=q_BNSD.shape[1],
        head_dim=q_BNSD.shape[3],
        queries=q_BNSD.shape[2],
        keys=k_BKTD.shape[2],
        softcap=softcap,
    )
    if choice.kernel == "math":
        out_BNSD = _math(q_BNSD, k_BKTD, v_BKTD, positions.bias, positions.mask.causal, scale, sinks_N1, softcap)
    elif softcap is not None:
        out_BNSD = _capped(q_BNSD, k_BKTD, v_BKTD, positions, scale, sinks_N1, softcap)
    else:
        if sinks_N1 is not None:
            sinks_BNS1 = (sinks_N1[:, None] / scale).to(q_BNSD.dtype).expand(*q_BNSD.shape[:3], 1)
            q_BNSD, k_BKTD = beside(q_BNSD, sinks_BNS1), F.pad(k_BKTD, (0, BESIDE))
        run = _sdpa if sinks_N1 is None else _with_sink
        if positions.mask.window is not None:
            out_BNSD = _in_window(run, q_BNSD, k_BKTD, v_BKTD, positions, positions.mask.window, scale)
        else:
            out_BNSD = run(q_BNSD, k_BKTD, v_BKTD, positions.bias, positions.mask.causal, scale)
    return out_BNSD if positions.blind is None else out_BNSD.masked_fill(positions.blind, 0)


def beside(x: Tensor, channel: Tensor) -> Tensor:
    """x with one more channel, and zeros after it up to `BESIDE` more, since fused kernels need a multiple of 8."""
    return torch.cat([x, F.pad(channel, (0, BESIDE - 1))], dim=-1)


def _math(
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    sinks_N1: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The formula, in float32 or wider throughout."""
    wide = torch.promote_types(q_BNSD.dtype, torch.float32)
    k_BNTD, v_BNTD = (repeat_heads(x_BKTD.to(wide), q_BNSD.shape[1]) for x_BKTD in (k_BKTD, v_BKTD))
    scores_BNST = (q_BNSD.to(wide) @ k_BNTD.transpose(2, 3)) * scale
    if softcap is not None:
        scores_BNST = softcap * torch.tanh(scores_BNST / softcap)
    if bias is not None:
        scores_BNST = scores_BNST + bias
    elif causal and q_BNSD.shape[2] > 1:
        later = torch.ones(scores_BNST.shape[2:], dtype=torch.bool, device=q_BNSD.device).triu(1)
        scores_BNST = scores_BNST.masked_fill(later, -math.inf)
    if sinks_N1 is not None:
        sinks_BNS1 = sinks_N1[:, None].to(wide).expand(*scores_BNST.shape[:3], 1)
        scores_BNST = torch.cat([scores_BNST, sinks_BNS1], dim=-1)
    weights_BNST = scores_BNST.softmax(dim=-1)[..., : k_BKTD.shape[2]]
    return (weights_BNST @ v_BNTD).to(q_BNSD.dtype)


def _capped(
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    positions: Positions,
    scale: float,
    sinks_N1: Tensor | None,
    softcap: float,
) -> Tensor:
    """`_math` by blocks of queries, which the backward pass recomputes: at most `SCORES_AT_ONCE` scores, or one row, at once.

    No fused kernel of torch takes a function of scores, but for FlexAttention, which needs a compiler.
    """
    batch, heads, queries, _ = q_BNSD.shape
    mask, offset, keys = positions.mask, positions.offset, k_BKTD.shape[2]
    size, outputs = max(1, SCORES_AT_ONCE // (batch * heads * keys)), []

    def of_block(start: int, of_block_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        end = start + of_block_BNSD.shape[2]
        first = 0 if mask.window is None else max(0, start - mask.window + 1)
        seen = range(first, end if mask.causal else keys)
        k_BKTD, v_BKTD = (x_BKTD[:, :, seen.start : seen.stop] for x_BKTD in (k_BKTD, v_BKTD))
        bias = positions.make_bias(range(start, end), seen)
        return _math(of_block_BNSD, k_BKTD, v_BKTD, bias, False, scale, sinks_N1, softcap)

    for number, of_block_BNSD in enumerate(q_BNSD.split(size, dim=2)):
        arguments = offset + number * size, of_block_BNSD, k_BKTD, v_BKTD
        recomputed = torch.is_grad_enabled() and queries > size
        outputs.append(checkpoint(of_block, *arguments, use_reentrant=False) if recomputed else of_block(*arguments))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _with_sink(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`_sdpa` with one more key before all others. Its value is 0, its score for a query what `beside` has put there."""
    batch, heads, _, width = k_BKTD.shape
    sink_BK1D = F.pad(k_BKTD.new_ones(batch, heads, 1, 1), (width - BESIDE, BESIDE - 1))
    k_BKTD, v_BKTD = torch.cat([sink_BK1D, k_BKTD], dim=2), F.pad(v_BKTD, (0, 0, 1, 0))
    if bias is None and causal and q_BNSD.shape[2] > 1:  # a query before all others, so that no mask is needed
        return _sdpa(F.pad(q_BNSD, (0, 0, 1, 0)), k_BKTD, v_BKTD, None, True, scale)[:, :, 1:]
    return _sdpa(q_BNSD, k_BKTD, v_BKTD, None if bias is None else F.pad(bias, (1, 0)), False, scale)


def _sdpa(q_BNSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's fused kernels. Without a bias there is one query, or as many as keys."""
    width, bias = v_BKTD.shape[3], None if bias is None else bias.to(q_BNSD.dtype)
    if width < q_BNSD.shape[3]:
        # Flash kernels need q, k and v of equal width. Without this padding torch falls back to an S × T matrix for every head.
        v_BKTD = F.pad(v_BKTD, (0, q_BNSD.shape[3] - width))
    if not reads_grouped_heads(q_BNSD, k_BKTD.shape[1], bias):
        k_BKTD, v_BKTD = (repeat_heads(x_BKTD, q_BNSD.shape[1]) for x_BKTD in (k_BKTD, v_BKTD))
    out_BNSD = F.scaled_dot_product_attention(
        q_BNSD,
        k_BKTD,
        v_BKTD,
        attn_mask=bias,
        is_causal=bias is None and causal and q_BNSD.shape[2] > 1,
        scale=scale,
        enable_gqa=k_BKTD.shape[1] < q_BNSD.shape[1],
    )
    return out_BNSD[..., :width]


def _in_window(
    run: Callable[..., Tensor],
    q_BNSD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    positions: Positions,
    window: int,
    scale: float,
) -> Tensor:
    """`run`, `_sdpa` or `_with_sink`, by blocks of queries, each with the keys in its reach: T · 2 `window` scores, not T²."""
    queries, offset = q_BNSD.shape[2], positions.offset
    before = min(offset, window - 1)  # keys of earlier tokens that the first query sees
    k_BKTD, v_BKTD = (x_BKTD[:, :, offset - before :] for x_BKTD in (k_BKTD, v_BKTD))
    size = max(window, FEWEST_IN_BLOCK)
    sizes = [min(size, queries - start) for start in range(0, queries, size)]
    # Split, so that the backward pass writes each gradient of keys twice; a slice's is as large as all keys.
    keys, values = (x_BKTD.split([before, *sizes], dim=2) for x_BKTD in (k_BKTD, v_BKTD))
    outputs, end = [], offset
    for number, of_block_BNSD in enumerate(q_BNSD.split(sizes, dim=2)):
        near_BKTD, of_near_BKTD = (torch.cat(parts[number : number + 2], dim=2) for parts in (keys, values))
        start, end = end, end + sizes[number]
        bias = positions.bias_between(range(start, end), range(end - near_BKTD.shape[2], end))
        outputs.append(run(of_block_BNSD, near_BKTD, of_near_BKTD, bias, False, scale))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def reads_grouped_heads(q_BNSD: Tensor, key_heads: int, bias: Tensor | None) -> bool:
    """Whether to pass torch's kernel fewer key heads than query heads, instead of repeating them.

    On CUDA only flash and cuDNN accept fewer: in half precision and, for flash, without a mask. All else would fall back to
    the math backend, which stores S × T scores. The memory-efficient kernel avoids that but needs repeated heads of K and V.
    A single query has no S × T scores to avoid.
    """
    half = q_BNSD.dtype in (torch.bfloat16, torch.float16)
    if q_BNSD.is_cuda:
        return q_BNSD.shape[2] == 1 or (half and bias is None)
    # The CPU's backward pass runs one thread per key head: with fewer heads than threads, some threads idle.
    return not torch.is_grad_enabled() or q_BNSD.shape[0] * key_heads >= num_threads()


@torch.compiler.assume_constant_result
def num_threads() -> int:
    """torch.get_num_threads, hidden from torch.compile, which cannot trace it."""
    return torch.get_num_threads()
