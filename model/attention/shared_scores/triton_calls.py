"""Shared scores on a GPU: Triton kernels for MHE-ADD's heads, forward and backward, without atomics and host syncs.

For head i: logit = scale · q_t·k_j + c_i[j] − m_i (t − j) with c_i[j] = scale · e^Q_i·k_j. With P = exp(scale · q kᵀ − r[t])
and w_i[j] = exp(c_i[j] + m_i j − that of the head's best key, the reference), a group of heads is one product P
[w_1 ⊙ v | … | w_H ⊙ v], 128 to 256 columns wide. Many narrow heads thus cost as much as a few wide ones, with one head's exps.

**Division.** Forward and dq: a program owns a tile of queries and a group of heads and loops over the tiles of keys; dk, dv,
dc: it owns a tile of keys and loops over the queries. W = [w ⊙ v] and G = [dhead ⊙ φ] live in registers and are never stored.
Scores are recomputed once for each group, DEPTH/(H·WIDTH) of the wide product's work, and G Wᵀ once for dq and once for dk: a
third more work than with atomics. torch sums dq, dk and dv of the groups, in a fixed order. Stored besides the results, in
float32: c and dc (B, T, N), δ and lse (S, B, N), and one (B, T, D) per group for each of dq, dk, dv.

**Numerical safety.** A reference serves a segment of keys if no head's biases span more than 64 over it, otherwise one tile. If
they span more even over a tile, its heads are computed from their own scores, one after the other. So where a row has its
largest score of those keys, P is 1, w and the denominator are at least e^-64, and terms that underflow are below float32's
rounding. References are combined by one factor for each row and head. Slopes multiply distances to the reference, never
positions.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
MAX_HEAD_DIM = 256  # wider tiles of keys, values and weights exceed an H100's shared memory


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of the kernels: powers of two, at least 16 except `segment`.

    `rows`: queries of a tile. `columns`: of a group of heads. Both also exist for the backward pass, where `key_rows` queries
    at a time are multiplied with a tile of keys. `keys`: of a tile; over 64 keys ALiBi's slopes, all below 1, stay within the
    range of a reference. `segment`: tiles of keys that may share a reference.
    """

    rows: int = 128
    keys: int = 64
    columns: int = 128
    backward_rows: int = 64
    key_rows: int = 64
    backward_columns: int = 128
    segment: int = 8
    warps: int = 8
    stages: int = 2

    def of_backward(self) -> Tiles:
        """The same tiles with the backward pass's rows and columns instead of the forward's."""
        return replace(self, rows=self.backward_rows, columns=self.backward_columns)


def default_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles for an H100, whose register file holds a forward program's two accumulators of rows × columns float32 numbers.

    Chosen by the registers and shared memory that the kernels use when compiled for sm_90, not by timing. A float32 product is
    split into three, whose operands need so much of both that its tiles are small. Tiles for one or two channels are small too,
    since they hold many heads.
    """
    width = _power_of_two(head_dim)
    if dtype == torch.float32:
        rows = 32 if width <= 128 else 16
        return Tiles(64, 32, max(128, width), rows, rows, max(64, width), segment=16, stages=1)
    if width <= 2:
        return Tiles(rows=64, columns=64, backward_columns=64)
    if width <= 32:
        return Tiles()
    if width <= 64:
        return Tiles(rows=64, columns=256)
    return Tiles(rows=64, columns=256, key_rows=32, backward_columns=256)


def is_available(device: torch.device) -> bool:
    """Whether Triton can run here: on CUDA, or anywhere in its interpreter."""
    return INSTALLED and (device.type == "cuda" or _interpreted())


def forward(
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
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Heads (S, B, N, D) in the type of q, and log Σ_j exp of their scores (S, B, N), +inf for a query that sees no key.

    The queries are the last S of the T tokens. ValueError for types other than float32 and bfloat16 and for D > MAX_HEAD_DIM.
    """
    tiles = tiles or default_tiles(q_BSD.shape[2], q_BSD.dtype)
    plan = _Plan(q_BSD, k_BTD, v_BTD, e_query_ND, slopes_N, valid_BT, documents_BT, scale, causal, tiles)
    heads_SBND = q_BSD.new_empty(plan.queries, plan.batch, plan.heads, plan.head_dim, dtype=plan.stored)
    lse_SBN = q_BSD.new_empty(heads_SBND.shape[:3], dtype=torch.float32)
    blocks = _ceil(plan.queries, tiles.rows)
    _kernels().forward_kernel[(blocks, plan.groups, plan.batch)](
        *plan.inputs,
        plan.key_spans(tiles.rows),
        e_value_ND.float().contiguous(),
        *plan.masks,
        heads_SBND,
        lse_SBN,
        *plan.sizes,
        BM=tiles.rows,
        **plan.constants,
    )
    return heads_SBND.to(q_BSD.dtype), lse_SBN


def backward(
    d_heads_SBND: Tensor,
    q_BSD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    e_query_ND: Tensor,
    e_value_ND: Tensor,
    slopes_N: Tensor | None,
    valid_BT: Tensor | None,
    documents_BT: Tensor | None,
    heads_SBND: Tensor,
    lse_SBN: Tensor,
    scale: float,
    causal: bool,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, e^Q and e^V, each in the type of its tensor, from what `forward` returned.

    With φ_i = exp(r + reference − lse_i) and δ_i = dhead_i · (head_i − e^V_i): G = [dhead_i φ_i | −δ_i φ_i], dS = P ⊙ (G Wᵀ),
    dW = Pᵀ G, and dc_i = w_i (v · dW_i + dW of w_i) for the key biases c_i.
    """
    tiles = (tiles or default_tiles(q_BSD.shape[2], q_BSD.dtype)).of_backward()
    plan = _Plan(q_BSD, k_BTD, v_BTD, e_query_ND, slopes_N, valid_BT, documents_BT, scale, causal, tiles)
    rows = tiles.rows
    heads_SBND, d_heads_SBND = heads_SBND.contiguous(), d_heads_SBND.contiguous()
    delta_SBN = _delta(heads_SBND, d_heads_SBND, e_value_ND.float().contiguous())
    upstream = (d_heads_SBND, lse_SBN.contiguous(), delta_SBN)
    parts = (plan.groups, plan.batch)
    dq_GBSD = delta_SBN.new_empty(*parts, *q_BSD.shape[1:])
    dk_GBTD, dv_GBTD = delta_SBN.new_empty(*parts, *k_BTD.shape[1:]), delta_SBN.new_empty(*parts, *k_BTD.shape[1:])
    dc_BTN = torch.empty_like(plan.c_BTN)
    _kernels().query_gradient_kernel[(_ceil(plan.queries, rows), *parts)](
        *plan.inputs, plan.key_spans(rows), *plan.masks, *upstream, dq_GBSD, *plan.sizes, BM=rows, **plan.constants
    )
    _kernels().key_gradient_kernel[(plan.key_tiles, *parts)](
        *plan.inputs,
        plan.query_spans(tiles.key_rows),
        *plan.masks,
        *upstream,
        dk_GBTD,
        dv_GBTD,
        dc_BTN,
        *plan.sizes,
        BM=tiles.key_rows,
        **plan.constants,
    )
    dk_BTD = dk_GBTD.sum(0) + dc_BTN @ plan.e_ND
    de_query_ND = scale * (dc_BTN.flatten(0, 1).T @ k_BTD.float().flatten(0, 1))
    de_value_ND = d_heads_SBND.sum((0, 1), dtype=torch.float32)
    return (
        dq_GBSD.sum(0).to(q_BSD.dtype),
        dk_BTD.to(k_BTD.dtype),
        dv_GBTD.sum(0).to(v_BTD.dtype),
        de_query_ND.to(e_query_ND.dtype),
        de_value_ND.to(e_value_ND.dtype),
    )


class _Plan:
    """The arguments that all kernels share, and the references of the key biases."""

    def __init__(
        self,
        q_BSD: Tensor,
        k_BTD: Tensor,
        v_BTD: Tensor,
        e_query_ND: Tensor,
        slopes_N: Tensor | None,
        valid_BT: Tensor | None,
        documents_BT: Tensor | None,
        scale: float,
        causal: bool,
        tiles: Tiles,
    ) -> None:
        (self.batch, self.queries, self.head_dim), self.keys = q_BSD.shape, k_BTD.shape[1]
        self.heads, self.causal = e_query_ND.shape[0], causal
        _check(q_BSD, k_BTD, v_BTD)
        self.stored = torch.float32 if _interpreted() else q_BSD.dtype  # the interpreter truncates to bfloat16
        self.tiles = tiles
        group = group_size(self.heads, self.head_dim, self.tiles.columns)
        self.groups, self.key_tiles = _ceil(self.heads, group), _ceil(self.keys, self.tiles.keys)
        self.valid_BT = None if valid_BT is None else valid_BT.contiguous().view(torch.uint8)
        self.documents_BT = None if documents_BT is None else documents_BT.contiguous()
        # float32 throughout: exponents need absolute accuracy.
        self.e_ND = e_query_ND.float() * scale
        self.c_BTN = k_BTD.float() @ self.e_ND.T
        slopes_N = torch.zeros_like(self.e_ND[:, 0]) if slopes_N is None else slopes_N.float()
        q_BSD, k_BTD, v_BTD = (x if x.stride(2) == 1 else x.contiguous() for x in (q_BSD, k_BTD, v_BTD))
        self.constants = compile_constants(
            self.tiles, self.heads, self.head_dim, q_BSD.dtype, causal, valid_BT is not None, documents_BT is not None
        )
        unused = self.c_BTN
        self.masks = (
            slopes_N.contiguous(),
            unused if self.valid_BT is None else self.valid_BT,
            unused if self.documents_BT is None else self.documents_BT,
        )
        self.inputs = (q_BSD, k_BTD, v_BTD, self.c_BTN, *self._references(group))
        strides = tuple(stride for x in (q_BSD, k_BTD, v_BTD) for stride in x.stride()[:2])
        self.sizes = (scale, *strides, self.batch, self.queries, self.keys, self.heads, self.key_tiles)

    def _references(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Bias and key of every head's reference in each tile of keys (B, tiles, N), and how many tiles share it."""
        ref_c = self.c_BTN.new_empty(self.batch, self.key_tiles, self.heads)
        ref_key = torch.empty_like(ref_c, dtype=torch.int32)
        run = ref_key.new_empty(self.batch, self.groups, self.key_tiles)
        slopes_N, valid_BT, _ = self.masks
        segments = _ceil(self.key_tiles, self.tiles.segment)
        _kernels().references_kernel[(segments, self.groups, self.batch)](
            self.c_BTN,
            slopes_N,
            valid_BT,
            ref_c,
            ref_key,
            run,
            self.keys,
            self.heads,
            self.key_tiles,
            BN=self.tiles.keys,
            HEADS=group,
            SEGMENT=self.tiles.segment,
            PADDED=self.valid_BT is not None,
        )
        return ref_c, ref_key, run

    def key_spans(self, rows: int) -> Tensor:
        """(B, tiles of queries, 2): the first and the end of the tiles of keys that each tile of queries may see."""
        return self._spans(rows, lambda meets_BQK: meets_BQK)

    def query_spans(self, rows: int) -> Tensor:
        """(B, tiles of keys, 2): the first and the end of the tiles of queries that may see each tile of keys."""
        return self._spans(rows, lambda meets_BQK: meets_BQK.transpose(1, 2))

    def _spans(self, rows: int, arrange: Callable[[Tensor], Tensor]) -> Tensor:
        """Spans of the last dimension where tiles of queries see tiles of keys, by range of documents and by padding.

        Without padding and documents the kernels compute the spans themselves, and the tensor is a placeholder.
        """
        if self.valid_BT is None and self.documents_BT is None:
            return self.c_BTN
        query_blocks, device = _ceil(self.queries, rows), self.c_BTN.device
        offset = self.keys - self.queries
        row = (offset + torch.arange(query_blocks * rows, device=device)).clamp(max=self.keys - 1).view(-1, rows)
        key = torch.arange(self.key_tiles * self.tiles.keys, device=device).clamp(max=self.keys - 1).view(-1, self.tiles.keys)
        meets_BQK = torch.ones(self.batch, query_blocks, self.key_tiles, dtype=torch.bool, device=device)
        if self.causal:
            meets_BQK &= key[:, 0] <= row[:, -1:]
        if self.valid_BT is not None:
            meets_BQK &= self.valid_BT[:, key].amax(2).bool()[:, None]
        if self.documents_BT is not None:
            own, other = self.documents_BT[:, row], self.documents_BT[:, key]
            meets_BQK &= own.amin(2)[:, :, None] <= other.amax(2)[:, None]
            meets_BQK &= own.amax(2)[:, :, None] >= other.amin(2)[:, None]
        meets = arrange(meets_BQK).to(torch.int32)
        first, end = meets.argmax(2), meets.shape[2] - meets.flip(2).argmax(2)
        return torch.stack([first, torch.where(meets.amax(2) > 0, end, first)], 2).to(torch.int32).contiguous()


@cache
def _kernels() -> ModuleType:
    """Imported on first use: Triton may be missing, and its import is slow."""

    from model.attention.shared_scores import triton_kernels

    return triton_kernels


def compile_constants(
    tiles: Tiles, heads: int, head_dim: int, dtype: torch.dtype, causal: bool, padded: bool, packed: bool
) -> dict[str, Any]:
    """Compile-time constants of the attention kernels, except their tile of queries."""
    width, bf16, tl = _power_of_two(head_dim), dtype == torch.bfloat16, _kernels().tl
    return {
        "D": head_dim,
        "BN": tiles.keys,
        "HEADS": group_size(heads, head_dim, tiles.columns),
        "WIDTH": width,
        "DEPTH": max(16, width),
        "CAUSAL": causal,
        "PADDED": padded,
        "PACKED": packed,
        "DOT": tl.bfloat16 if bf16 and not _interpreted() else tl.float32,
        "ROUND": bf16 and _interpreted(),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def group_size(heads: int, head_dim: int, columns: int) -> int:
    """How many heads form a group: a power of two, no more than needed, at least 16 columns wide."""
    width = _power_of_two(head_dim)
    wanted = min(_power_of_two(heads), max(1, columns // width))
    return max(wanted, 16 // width, 1)


def delta_rows(width: int) -> int:
    """Rows that a program of `delta_kernel` takes at once."""
    return max(16, 4096 // width)


def _delta(heads_SBND: Tensor, d_heads_SBND: Tensor, e_value_ND: Tensor) -> Tensor:
    """dhead · (head − e^V), (S, B, N)."""
    *shape, heads, head_dim = heads_SBND.shape
    delta_SBN = heads_SBND.new_empty(*shape, heads, dtype=torch.float32)
    rows, width = delta_SBN.numel(), _power_of_two(head_dim)
    block = delta_rows(width)
    if _interpreted():
        heads_SBND, d_heads_SBND = heads_SBND.float(), d_heads_SBND.float()
    _kernels().delta_kernel[(_ceil(rows, block),)](
        heads_SBND, d_heads_SBND, e_value_ND, delta_SBN, rows, heads, D=head_dim, ROWS=block, WIDTH=width
    )
    return delta_SBN


def _check(*tensors_BTD: Tensor) -> None:
    types = {x.dtype for x in tensors_BTD}
    if len(types) > 1 or not types <= {torch.float32, torch.bfloat16}:
        raise ValueError(f"q, k and v must all be float32 or all bfloat16, not {sorted(map(str, types))}")
    if tensors_BTD[0].shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {tensors_BTD[0].shape[2]} exceeds {MAX_HEAD_DIM}, the widest that fits these kernels")


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; the environment decides when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
