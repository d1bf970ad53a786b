"""Shared scores with torch's own matrix products, in tiles of keys × blocks of queries. For CPUs; runs on any device.

For a sequence and a group of heads, with c_i[j] = scale · e^Q_i·k_j and ALiBi's slope m_i:

    P = exp(S − r),  S = scale · q kᵀ       one matrix for all heads of the group; r[t] a reference of the row
    w_i[j] = exp(c_i[j] + m_i j − …)        at most 1: relative to the head's best key, the reference of its keys
    [head_i · den_i | den_i] = P [w_i ⊙ v | w_i]

so that all heads are one product with W = [w_1 ⊙ v | … | w_n ⊙ v | w_1 … w_n]. W exists for one tile of keys at a time, P for
one block of queries, so nothing grows with n·T² or holds keys and values of n heads. Tensors per key are stored channel first,
(…, T), tensors per query row first, so that elementwise work is contiguous at any head_dim.

**Numerical safety.** In the key tile where a row has its largest score, P is 1 and w at least exp(−range of c_i[j] + m_i j over
the keys that share a reference). `plan` gives each head a tile small enough that this range is at most SAFE_RANGE, whatever the
inputs. Then the denominator is at least e^-64, and terms that underflow are below float32's rounding. Sums of several tiles are
combined by one factor for each row and head. A head whose range is larger even over SMALLEST_TILE keys is computed alone, from
its own scores with the embedding added to its queries: exact multi-query attention.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.positions.masks import AttentionMask

SAFE_RANGE = 64.0
SMALLEST_TILE = 64
TILES = (256, SMALLEST_TILE)  # keys that share a reference if one for all keys is not safe
KEY_TILE = 512  # keys for which W exists at one time
FULL_ROWS = 512  # queries in a block that sees a full tile
DIAGONAL_ROWS = 64  # queries in a block that sees part of a causal tile: half of such a block's work is wasted
LOGARITHMS = torch.float64
NEGLIGIBLE = SAFE_RANGE + 48  # exp(-48) is below the rounding of float64
LAZY = 20.0  # a row's reference may lag its maximum by this much before the accumulators are rescaled


@dataclass(frozen=True)
class Part:
    """Heads of one sequence that are computed together.

    `heads` selects them. `q_DS`: their scaled queries. `c_NT`: their key biases, in float64 if slopes are added, which makes
    large numbers. `tile`: how many keys share a reference, None for all. `alone`: a single head from its own scores, with its
    embedding in the queries and only the slope as key bias.
    """

    heads: slice | Tensor
    q_DS: Tensor
    c_NT: Tensor
    slopes_N: Tensor | None
    tile: int | None
    alone: bool = False


def plan(q_DS: Tensor, k_DT: Tensor, e_ND: Tensor, slopes_N: Tensor | None) -> Iterator[Part]:
    """Divide the heads by the range of their key biases. Queries and embeddings are already scaled."""
    c_NT = e_ND @ k_DT if slopes_N is None else e_ND.double() @ k_DT.double()
    heads, keys = c_NT.shape
    bias_NT = c_NT if slopes_N is None else c_NT + slopes_N[:, None] * torch.arange(keys, device=c_NT.device)
    waiting_N = torch.ones(heads, dtype=torch.bool)
    for tile in (None, *TILES):
        parts = bias_NT.split(tile or keys, dim=1)
        range_N = torch.stack([part.amax(1) - part.amin(1) for part in parts]).amax(0)
        safe_N = waiting_N & (range_N <= SAFE_RANGE).cpu()
        if safe_N.any():
            chosen = _indices(safe_N)
            yield Part(chosen, q_DS, c_NT[chosen], None if slopes_N is None else slopes_N[chosen], tile)
        waiting_N &= ~safe_N
        if not waiting_N.any():
            return
    for head in waiting_N.nonzero()[:, 0].tolist():
        one = slice(head, head + 1)
        slope_N, tile = (None, None) if slopes_N is None else (slopes_N[one], _safe_tile(float(slopes_N[head])))
        yield Part(one, q_DS + e_ND[one].T, torch.zeros_like(c_NT[one]), slope_N, tile, alone=True)


def _indices(chosen_N: Tensor) -> slice | Tensor:
    """The chosen heads, as a slice if they are contiguous."""
    heads = chosen_N.nonzero()[:, 0]
    first, last = int(heads[0]), int(heads[-1])
    return slice(first, last + 1) if last - first + 1 == len(heads) else heads


def _safe_tile(slope: float) -> int:
    """The largest tile of at most SMALLEST_TILE keys over which `slope` alone stays within SAFE_RANGE."""
    return max(1, min(SMALLEST_TILE, int(SAFE_RANGE / abs(slope)))) if slope else SMALLEST_TILE


class Workspace(threading.local):
    """Scratch matrices that each thread reuses: allocating fresh memory costs as much as several passes over it.

    They hold a few tiles of one group of heads: (KEY_TILE + FULL_ROWS) · n(d + 1) numbers, and as many for the backward pass.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[object, ...], Tensor] = {}

    def matrix(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised contiguous (rows, columns) matrix of the type and device of `like`."""
        key = (name, like.dtype, like.device)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < rows * columns:
            with torch.inference_mode(False):  # a buffer allocated during generation must also work in training
                buffer = self.buffers[key] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return buffer[: rows * columns].view(rows, columns)


SPACE = Workspace()


class Sight:
    """Which of a sequence's T keys its S queries see, by blocks."""

    def __init__(self, mask: AttentionMask, batch: int, queries: int, keys: int, like: Tensor) -> None:
        self.causal = mask.causal
        self.queries, self.keys, self.offset = queries, keys, keys - queries
        self.hidden_T = None if mask.valid_BT is None else ~mask.valid_BT[batch]
        self.documents_T = None if mask.documents_BT is None else mask.documents_BT[batch]
        self.positions_S1 = torch.arange(self.offset, keys, device=like.device, dtype=like.dtype)[:, None]
        self.later = torch.full((DIAGONAL_ROWS, DIAGONAL_ROWS), -math.inf, device=like.device, dtype=like.dtype).triu_(1)

    def tiles(self, size: int) -> list[tuple[int, int]]:
        """(first, end) of each tile of keys in reverse order, so that near keys come before far ones."""
        return [(first, min(first + size, self.keys)) for first in range(0, self.keys, size)][::-1]

    def blocks(self, first_key: int, end_key: int) -> Iterator[tuple[int, int, int, bool]]:
        """Blocks of queries that see some of a tile: (first row, end row, keys they see, whether it is their first tile).

        Rows whose position lies in a causal tile see part of it. It is their first tile, since tiles come in reverse order.
        """
        diagonal_end = min(self.queries, end_key - self.offset) if self.causal else 0
        start = max(0, first_key - self.offset) if self.causal else 0
        for row in range(start, diagonal_end, DIAGONAL_ROWS):
            end = min(row + DIAGONAL_ROWS, diagonal_end)
            yield row, end, self.offset + end - first_key, True
        for row in range(max(start, diagonal_end), self.queries, FULL_ROWS):
            end = min(row + FULL_ROWS, self.queries)
            if not self._other_documents(row, end, first_key, end_key):
                yield row, end, end_key - first_key, False

    def hide(self, scores: Tensor, row: int, first_key: int) -> None:
        """Set the scores of keys that a block of queries does not see to -inf."""
        rows, keys = scores.shape
        reach = self.offset + row + 1 - first_key  # keys that the first row may see
        if self.causal and reach < keys:
            scores[:, keys - rows :].add_(self.later[:rows, :rows])
        if self.hidden_T is not None:
            scores.masked_fill_(self.hidden_T[first_key : first_key + keys], -math.inf)
        if self.documents_T is not None:
            own = self.documents_T[self.offset + row : self.offset + row + rows, None]
            scores.masked_fill_(own != self.documents_T[first_key : first_key + keys], -math.inf)

    def _other_documents(self, row: int, end: int, first_key: int, end_key: int) -> bool:
        if self.documents_T is None:
            return False
        rows, keys = self.documents_T[self.offset + row : self.offset + end], self.documents_T[first_key:end_key]
        return bool((rows.amin() > keys.amax()) | (rows.amax() < keys.amin()))


class Reference:
    """The best key of each head among some keys; their weights are relative to it."""

    def __init__(self, c_NT: Tensor, slopes_N: Tensor | None) -> None:
        self.slopes_N = slopes_N
        if slopes_N is None:
            self.c_N = c_NT.amax(1)
        else:
            self.key_N = (c_NT + slopes_N[:, None] * torch.arange(c_NT.shape[1], device=c_NT.device)).argmax(1)
            self.c_N = c_NT.gather(1, self.key_N[:, None])[:, 0]

    def weigh(self, W: Tensor, c_NT: Tensor, v_DT: Tensor, first: int) -> Tensor:
        """Fill W with [w_i ⊙ v | w_i], (n·d + n, keys); return its part w, (n, keys).

        The keys begin at offset `first` in the keys from which the reference was chosen.
        """
        heads, width = c_NT.shape[0], v_DT.shape[0]
        w_NT = W[heads * width :]
        if self.slopes_N is None:
            torch.sub(c_NT, self.c_N[:, None], out=w_NT).exp_()
        else:
            keys = torch.arange(first, first + c_NT.shape[1], device=c_NT.device)
            exponent_NT = c_NT - self.c_N[:, None] + self.slopes_N[:, None] * (keys - self.key_N[:, None])
            w_NT.copy_(exponent_NT.exp_())
        torch.mul(w_NT[:, None], v_DT, out=W[: heads * width].view(heads, width, -1))
        return w_NT

    def log_scale(self, row_S1: Tensor, distance_S1: Tensor) -> Tensor:
        """(rows, n): the logarithm by which exp(S − row) W is too small; `distance` from the first key of the reference."""
        if self.slopes_N is None:
            return row_S1.double() + self.c_N
        return row_S1 + (self.c_N - self.slopes_N * (distance_S1 - self.key_N))


def scores(q_SD: Tensor, k_DT: Tensor, sight: Sight, row: int, first_key: int) -> Tensor:
    """Masked scores of a block of queries and the first keys of a tile."""
    S = torch.mm(q_SD, k_DT, out=SPACE.matrix("scores", q_SD.shape[0], k_DT.shape[1], k_DT))
    sight.hide(S, row, first_key)
    return S


def row_maximum(S: Tensor) -> Tensor:
    """(rows, 1), finite even if a row sees no key."""
    return S.amax(1, keepdim=True).clamp_(min=torch.finfo(S.dtype).min / 4)


def forward(
    q_BSD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    e_query_ND: Tensor,
    e_value_ND: Tensor,
    slopes_N: Tensor | None,
    mask: AttentionMask,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Heads (S, B, N, D) in the type of q, and log Σ_j exp of their scores (S, B, N), +inf for a query that sees no key.

    The logarithms are float64: with float32, weights of a score of 60 would have a relative error of up to 4e-6.
    """
    wide = torch.promote_types(q_BSD.dtype, torch.float32)
    (batch, queries, _), keys = q_BSD.shape, k_BTD.shape[1]
    heads_SBND = q_BSD.new_empty(queries, batch, *e_query_ND.shape)
    lse_SBN = torch.empty(heads_SBND.shape[:3], dtype=LOGARITHMS, device=q_BSD.device)
    e_ND, slopes_N = e_query_ND.to(wide) * scale, None if slopes_N is None else slopes_N.double()
    e_value_ND = e_value_ND.to(wide)
    for b in range(batch):
        q_DS, k_DT, v_DT = (_channel_first(x_BTD[b], wide) for x_BTD in (q_BSD, k_BTD, v_BTD))
        sight = Sight(mask, b, queries, keys, q_DS)
        for part in plan(q_DS.mul_(scale), k_DT, e_ND, slopes_N):
            out_SND = heads_SBND[:, b, part.heads]
            in_place = isinstance(part.heads, slice) and heads_SBND.dtype == wide
            if not in_place:
                out_SND = torch.empty(out_SND.shape, dtype=wide, device=q_BSD.device)
            lse_SBN[:, b, part.heads] = _forward(part, k_DT, v_DT, e_value_ND[part.heads], sight, out_SND)
            if not in_place:
                heads_SBND[:, b, part.heads] = out_SND.to(heads_SBND.dtype)
    return heads_SBND, lse_SBN


def backward(
    d_heads_SBND: Tensor,
    q_BSD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    e_query_ND: Tensor,
    e_value_ND: Tensor,
    slopes_N: Tensor | None,
    mask: AttentionMask,
    scale: float,
    heads_SBND: Tensor,
    lse_SBN: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, e^Q and e^V, each in the type of its tensor."""
    wide = torch.promote_types(q_BSD.dtype, torch.float32)
    (batch, queries, _), keys = q_BSD.shape, k_BTD.shape[1]
    e_ND, slopes_N = e_query_ND.to(wide) * scale, None if slopes_N is None else slopes_N.double()
    e_wide_value_ND = e_value_ND.to(wide)
    dq_BSD, dk_BTD, dv_BTD = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BSD, k_BTD, v_BTD))
    de_ND = torch.zeros_like(e_ND)
    for b in range(batch):
        q_DS, k_DT, v_DT = (_channel_first(x_BTD[b], wide) for x_BTD in (q_BSD, k_BTD, v_BTD))
        dq_DS, dk_DT, dv_DT = torch.zeros_like(q_DS), torch.zeros_like(k_DT), torch.zeros_like(v_DT)
        sight = Sight(mask, b, queries, keys, q_DS)
        for part in plan(q_DS.mul_(scale), k_DT, e_ND, slopes_N):
            heads_SND, d_heads_SND = (x_SBND[:, b, part.heads].to(wide) for x_SBND in (heads_SBND, d_heads_SBND))
            minus_delta_SN = _minus_delta(heads_SND, d_heads_SND, e_wide_value_ND[part.heads])
            d_own_DS = torch.zeros_like(q_DS) if part.alone else dq_DS
            upstream = (d_heads_SND, minus_delta_SN, lse_SBN[:, b, part.heads])
            dc_NT = _backward(part, k_DT, v_DT, sight, upstream, (d_own_DS, dk_DT, dv_DT))
            if part.alone:
                dq_DS += d_own_DS
                de_ND[part.heads] += d_own_DS.sum(1)
            else:
                de_ND[part.heads] += dc_NT @ k_DT.T
                dk_DT.addmm_(e_ND[part.heads].T, dc_NT)
        dq_BSD[b], dk_BTD[b], dv_BTD[b] = dq_DS.T * scale, dk_DT.T, dv_DT.T
    de_value_ND = d_heads_SBND.sum((0, 1), dtype=wide)
    return dq_BSD, dk_BTD, dv_BTD, (de_ND * scale).to(e_query_ND.dtype), de_value_ND.to(e_value_ND.dtype)


def _minus_delta(heads_SND: Tensor, d_heads_SND: Tensor, e_value_ND: Tensor) -> Tensor:
    """−dhead_i·(A_i v), (S, n), in blocks that fit the processor's cache."""
    queries, heads, width = heads_SND.shape
    minus_delta_SN = heads_SND.new_empty(queries, heads)
    for row in range(0, queries, FULL_ROWS):
        rows = slice(row, min(row + FULL_ROWS, queries))
        products = SPACE.matrix("products", rows.stop - row, heads * width, heads_SND).view(-1, heads, width)
        torch.sub(e_value_ND, heads_SND[rows], out=products).mul_(d_heads_SND[rows])
        torch.sum(products, -1, out=minus_delta_SN[rows])
    return minus_delta_SN


def _channel_first(x_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, D) → (D, T), a contiguous copy."""
    return torch.empty(x_TD.shape[::-1], dtype=dtype, device=x_TD.device).copy_(x_TD.T)


def _forward(part: Part, k_DT: Tensor, v_DT: Tensor, e_value_ND: Tensor, sight: Sight, out_SND: Tensor) -> Tensor:
    """Write the heads of `part` into `out_SND`; return log Σ exp of their scores, (S, n)."""
    queries, heads, width = out_SND.shape
    out_SX, sum_SN = out_SND.view(queries, heads * width), k_DT.new_zeros(queries, heads)
    one_reference = Reference(part.c_NT, part.slopes_N) if part.tile is None else None
    # By how much exp(log_SN) or exp(row_S1) the sums are too small.
    row_S1 = torch.full_like(sum_SN[:, :1], torch.finfo(sum_SN.dtype).min / 4)
    log_SN = row_S1.double().repeat(1, heads)
    if not sight.causal:
        out_SX.zero_()
    for first, end in sight.tiles(part.tile or KEY_TILE):
        c_NT = part.c_NT[:, first:end]
        reference = one_reference or Reference(c_NT, part.slopes_N)
        W = SPACE.matrix("weights", (width + 1) * heads, end - first, k_DT)
        reference.weigh(W, c_NT, v_DT[:, first:end], first if one_reference else 0)
        for row, end_row, keys, is_first in sight.blocks(first, end):
            rows = slice(row, end_row)
            S = scores(part.q_DS[:, rows].T, k_DT[:, first : first + keys], sight, row, first)
            sums = (out_SX[rows], sum_SN[rows])
            if one_reference:
                _add_to_row(S, W[:, :keys], sums, row_S1[rows], is_first)
            else:
                row_max = row_maximum(S)
                scale_log = reference.log_scale(row_max, sight.positions_S1[rows] - first)
                if is_first or (scale_log - log_SN[rows]).amax() > -NEGLIGIBLE:
                    _add_to_heads(S.sub_(row_max).exp_(), W[:, :keys], scale_log, sums, log_SN[rows], is_first)
    if one_reference:
        log_SN = one_reference.log_scale(row_S1, sight.positions_S1)
    seen = sum_SN > 0
    torch.addcmul(e_value_ND, out_SND, torch.where(seen, sum_SN.reciprocal(), 0)[..., None], out=out_SND)
    return torch.where(seen, log_SN + sum_SN.double().log(), math.inf)


def _add_to_row(S: Tensor, W: Tensor, sums: tuple[Tensor, Tensor], row_S1: Tensor, is_first: bool) -> None:
    """Add exp(S − row_S1) W to the sums. All heads share one scale per row, which changes only when necessary."""
    out_SX, sum_SN = sums
    values = out_SX.shape[1]
    if is_first:
        P = S.sub_(row_S1.copy_(row_maximum(S))).exp_()
        torch.mm(P, W[:values].T, out=out_SX)
        torch.mm(P, W[values:].T, out=sum_SN)
        return
    highest_S1 = torch.maximum(row_maximum(S), row_S1)
    if (highest_S1 - row_S1).amax() > LAZY:
        factor_S1 = (row_S1 - highest_S1).exp_()
        out_SX.mul_(factor_S1)
        sum_SN.mul_(factor_S1)
        row_S1.copy_(highest_S1)
    P = S.sub_(row_S1).exp_()
    out_SX.addmm_(P, W[:values].T)
    sum_SN.addmm_(P, W[values:].T)


def _add_to_heads(P: Tensor, W: Tensor, scale_log: Tensor, sums: tuple[Tensor, Tensor], log_SN: Tensor, is_first: bool) -> None:
    """Add P W, too small by exp(scale_log) for each row and head, to sums that are too small by exp(log_SN)."""
    out_SX, sum_SN = sums
    (rows, heads), values = sum_SN.shape, out_SX.shape[1]
    R = torch.mm(P, W.T, out=SPACE.matrix("sums", rows, values + heads, P))
    if is_first:
        out_SX.copy_(R[:, :values])
        sum_SN.copy_(R[:, values:])
        log_SN.copy_(scale_log)
        return
    new_SN = torch.maximum(log_SN, scale_log)
    old_factor, factor = ((log - new_SN).exp_().to(P.dtype) for log in (log_SN, scale_log))
    shape = (rows, heads, values // heads)
    out_SX.view(shape).mul_(old_factor[..., None]).addcmul_(R[:, :values].view(shape), factor[..., None])
    sum_SN.mul_(old_factor).addcmul_(R[:, values:], factor)
    log_SN.copy_(new_SN)


def _backward(
    part: Part,
    k_DT: Tensor,
    v_DT: Tensor,
    sight: Sight,
    upstream: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Accumulate the gradients of q (scaled), k and v through P and W; return the gradient of c_NT.

    With φ = exp(log of the scale of P W − lse) and G = [dhead ⊙ φ | −δ φ]: dS = P ⊙ (G Wᵀ), dW = Pᵀ G.
    """
    (d_heads_SND, minus_delta_SN, lse_SN), (dq_DS, dk_DT, dv_DT) = upstream, gradients
    _, heads, width = d_heads_SND.shape
    values, dc_NT = heads * width, torch.zeros_like(part.c_NT, dtype=k_DT.dtype)
    one_reference = Reference(part.c_NT, part.slopes_N) if part.tile is None else None
    if one_reference:
        row_S1, phi_SN = _row_scales(one_reference, lse_SN, sight)
    for first, end in sight.tiles(part.tile or KEY_TILE):
        k_tile, v_tile, c_NT = k_DT[:, first:end], v_DT[:, first:end], part.c_NT[:, first:end]
        reference = one_reference or Reference(c_NT, part.slopes_N)
        W = SPACE.matrix("weights", values + heads, end - first, k_DT)
        w_NT = reference.weigh(W, c_NT, v_tile, first if one_reference else 0)
        dW = SPACE.matrix("weight gradients", values + heads, end - first, k_DT)
        untouched = True
        for row, end_row, keys, _ in reversed(list(sight.blocks(first, end))):
            rows = slice(row, end_row)
            q_block, k_seen = part.q_DS[:, rows], k_tile[:, :keys]
            P = scores(q_block.T, k_seen, sight, row, first)
            if one_reference:
                P, phi = P.sub_(row_S1[rows]).exp_(), phi_SN[rows]
            else:
                row_max = row_maximum(P)
                phi = (reference.log_scale(row_max, sight.positions_S1[rows] - first) - lse_SN[rows]).exp_().to(P.dtype)
                if not phi.any():
                    continue
                P = P.sub_(row_max).exp_()
            G = SPACE.matrix("upstream", end_row - row, values + heads, k_DT)
            torch.mul(d_heads_SND[rows], phi[..., None], out=G[:, :values].view(-1, heads, width))
            torch.mul(minus_delta_SN[rows], phi, out=G[:, values:])
            if untouched and keys == end - first:
                torch.mm(G.T, P, out=dW)
            else:
                (dW.zero_() if untouched else dW)[:, :keys].addmm_(G.T, P)
            untouched = False
            dS = torch.mm(G, W[:, :keys], out=SPACE.matrix("score gradients", end_row - row, keys, k_DT)).mul_(P)
            dq_DS[:, rows].addmm_(k_seen, dS.T)
            dk_DT[:, first : first + keys].addmm_(q_block, dS)
        if untouched:
            continue
        # Multiply by w first: a gradient of W may be as large as 1/w.
        d_values_NDT = dW[:values].view(heads, width, -1).mul_(w_NT[:, None])
        dv_DT[:, first:end] += d_values_NDT.sum(0)
        products_NDT = torch.mul(d_values_NDT, v_tile, out=W[:values].view(heads, width, -1))
        torch.sum(products_NDT, 1, out=dc_NT[:, first:end]).addcmul_(dW[values:], w_NT)
    return dc_NT


def _row_scales(reference: Reference, lse_SN: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """A reference (S, 1) for P = exp(S − row) near each row's maximum, and its φ (S, n), from lse alone.

    It is the largest over the heads, so that exponents are small where attention is large. The smallest would keep φ below 1
    but double the error.
    """
    base_SN = lse_SN - reference.log_scale(torch.zeros_like(sight.positions_S1), sight.positions_S1)
    base_SN.masked_fill_(base_SN == math.inf, 0)  # rows that see no key: P is 0
    row_S1 = base_SN.amax(1, keepdim=True).to(sight.positions_S1.dtype)
    return row_S1, (row_S1 - base_SN).exp_().to(row_S1.dtype)
