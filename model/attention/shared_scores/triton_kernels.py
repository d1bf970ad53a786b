"""Triton kernels of shared scores; triton_calls.py launches them and describes how the work is divided.

Letters of shapes: M queries of a tile, J keys of a tile, D channels, H heads of a group, X = H·WIDTH columns, the group's heads
concatenated, each padded to a power of two. R = max(H, 16): a product sums over at least 16. A query's position t is its index
among the T keys. Pointers to c, references and slopes start at the first head of the group, pointers to masks at the sequence.
"""

# mypy: ignore-errors
# Triton compiles these functions; their arguments have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

SAFE_RANGE = tl.constexpr(
    64.0
)  # largest range of a head's biases with one reference: the denominator is ≥ e^-64, float32 holds e^-87
FAR = tl.constexpr(1e30)  # finite, so that FAR − FAR is not NaN


@triton.jit
def _product(a, b):
    """a · b in float32. Float32 operands are split into three TF32 products, as torch's own float32 attention does."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _operand(x, DOT: tl.constexpr, ROUND: tl.constexpr):
    """x as an operand of a product. ROUND: round to bfloat16 but stay float32; the interpreter cannot multiply bfloat16."""
    if ROUND:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(DOT)


@triton.jit
def _spread(x_MH, WIDTH: tl.constexpr):
    """(M, H) → (M, X): repeat each head's value in all its columns."""
    M: tl.constexpr = x_MH.shape[0]
    H: tl.constexpr = x_MH.shape[1]
    return tl.reshape(tl.broadcast_to(x_MH[:, :, None], (M, H, WIDTH)), (M, H * WIDTH))


@triton.jit
def _weigh(w_JH, v_JD):
    """W = [w_1 ⊙ v | … | w_H ⊙ v], (J, X)."""
    J: tl.constexpr = w_JH.shape[0]
    return tl.reshape(w_JH[:, :, None] * v_JD.to(tl.float32)[:, None, :], (J, w_JH.shape[1] * v_JD.shape[1]))


@triton.jit
def _rows(pointer, row, stride, end, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a (·, D) matrix, zero beyond `end` and D."""
    d = tl.arange(0, WIDTH)
    live = (row < end)[:, None] & (d < D)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + d[None, :], mask=live, other=0.0)


@triton.jit
def _columns(first_head, N, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """For each column X: its head in the group, its offset in a row (N·D), whether it is in bounds."""
    x = tl.arange(0, HEADS * WIDTH)
    head_X = x // WIDTH
    live_X = first_head + head_X < N
    if D == WIDTH:
        place_X = first_head * D + x  # the compiler recognises this as contiguous
    else:
        place_X = (first_head + head_X) * D + x % WIDTH
        live_X = live_X & (x % WIDTH < D)
    return head_X, place_X, live_X


@triton.jit
def _scores(a, b, scale, t, j, valid, documents, T, CAUSAL: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr):
    """scale · a bᵀ, −inf where position t does not see key j. t and j are a column and a row of indices, or vice versa."""
    seen = (t < T) & (j < T)
    if CAUSAL:
        seen = seen & (j <= t)
    if PADDED:
        seen = seen & (tl.load(valid + j, mask=j < T, other=0) != 0)
    if PACKED:
        own = tl.load(documents + t, mask=t < T, other=0)
        seen = seen & (own == tl.load(documents + j, mask=j < T, other=0))
    return tl.where(seen, _product(a, tl.trans(b)) * scale, float("-inf"))


@triton.jit
def _of_group(b, first_head, c, ref_c, ref_key, T, N, tiles):
    """Pointers to the key biases and references of a sequence and a group of heads."""
    place = b.to(tl.int64) * tiles * N + first_head
    return c + b.to(tl.int64) * T * N + first_head, ref_c + place, ref_key + place


@triton.jit
def _own_scores(S, t, j, h, c, slopes, T, N):
    """Head h's own scores from the shared ones (masked ones stay −inf)."""
    return S + tl.load(c + j.to(tl.int64) * N + h, mask=j < T, other=0.0) - tl.load(slopes + h) * (t - j).to(tl.float32)


@triton.jit
def _reference(tile, ref_c, ref_key, slopes, heads, N, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Each head's reference for the keys of a tile: the bias of its best key, that key, the head's slope."""
    h = tl.arange(0, SIZE)
    live = (h < heads) & (h < HEADS)
    c_H = tl.load(ref_c + tile * N + h, mask=live, other=0.0)
    key_H = tl.load(ref_key + tile * N + h, mask=live, other=0)
    return c_H, key_H, tl.load(slopes + h, mask=live, other=0.0)


@triton.jit
def _key_weights(j, tile, c, ref_c, ref_key, slopes, heads, T, N, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """w (J, SIZE) = exp(bias of the key − bias of the reference) ≤ 1, zero for heads out of bounds."""
    c_H, key_H, slope_H = _reference(tile, ref_c, ref_key, slopes, heads, N, HEADS, SIZE)
    h = tl.arange(0, SIZE)
    live = (h < heads) & (h < HEADS)
    c_JH = tl.load(c + j.to(tl.int64)[:, None] * N + h[None, :], mask=(j < T)[:, None] & live[None, :], other=0.0)
    log_JH = c_JH - c_H[None, :] + slope_H[None, :] * (j[:, None] - key_H[None, :]).to(tl.float32)
    # No visible key is above the reference; padding keys may be, and must stay finite.
    return tl.where(live[None, :], tl.exp(tl.minimum(log_JH, 0.0)), 0.0)


@triton.jit
def _row_scales(row, t, tile, lse, delta, ref_c, ref_key, slopes, S, N, stride, heads, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """A reference r (M) for P = exp(S − r), φ (M, SIZE) with softmax = P w φ, and δ φ.

    r is the least lse − reference of the heads: then φ ≤ 1, and P ≤ 1/w ≤ e^64 since the softmax is at most 1.
    """
    c_H, key_H, slope_H = _reference(tile, ref_c, ref_key, slopes, heads, N, HEADS, SIZE)
    h = tl.arange(0, SIZE)
    live = (row < S)[:, None] & ((h < heads) & (h < HEADS))[None, :]
    place = row.to(tl.int64)[:, None] * stride + h[None, :]
    lse_MH = tl.load(lse + place, mask=live, other=float("inf"))
    base_MH = lse_MH - (c_H[None, :] - slope_H[None, :] * (t[:, None] - key_H[None, :]).to(tl.float32))
    seen = lse_MH < float("inf")
    base_MH = tl.where(seen, base_MH, FAR)
    r_M = tl.min(base_MH, 1)
    phi_MH = tl.where(seen, tl.exp(r_M[:, None] - base_MH), 0.0)
    return r_M, phi_MH, phi_MH * tl.load(delta + place, mask=live, other=0.0)


@triton.jit
def references_kernel(
    c, slopes, valid, ref_c, ref_key, run, T, N, tiles,
    BN: tl.constexpr, HEADS: tl.constexpr, SEGMENT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Choose the references of a segment of SEGMENT tiles of keys for one group of heads.

    One for the segment if no head's biases span more than SAFE_RANGE over it, otherwise one for each tile. `run` holds for each
    tile how many tiles, counted from it, share its reference; 0 if the tile alone spans more.
    """
    first, group, b = tl.program_id(0) * SEGMENT, tl.program_id(1), tl.program_id(2)
    h = tl.arange(0, HEADS)
    live = group * HEADS + h < N
    c, ref_c, ref_key = _of_group(b, group * HEADS, c, ref_c, ref_key, T, N, tiles)
    run += (b * tl.num_programs(1) + group) * tiles
    slope_H = tl.load(slopes + group * HEADS + h, mask=live, other=0.0)
    best_H = tl.full((HEADS,), -FAR, tl.float32)
    least_H = tl.full((HEADS,), FAR, tl.float32)
    best_c_H = tl.zeros((HEADS,), tl.float32)
    best_key_H = tl.zeros((HEADS,), tl.int32)
    end = tl.minimum(first + SEGMENT, tiles)
    for tile in range(first, end):
        j = tile * BN + tl.arange(0, BN)
        counts = j < T
        if PADDED:
            counts = counts & (tl.load(valid + b.to(tl.int64) * T + j, mask=j < T, other=0) != 0)
        here = counts[:, None] & live[None, :]
        c_JH = tl.load(c + j.to(tl.int64)[:, None] * N + h[None, :], mask=here, other=0.0)
        bias_JH = c_JH + slope_H[None, :] * (j - first * BN).to(tl.float32)[:, None]
        high_H = tl.max(tl.where(here, bias_JH, -FAR), 0)
        low_H = tl.min(tl.where(here, bias_JH, FAR), 0)
        key_H = tl.argmax(tl.where(here, bias_JH, -FAR), 0) + tile * BN
        c_H = tl.sum(tl.where(j[:, None] == key_H[None, :], c_JH, 0.0), 0)
        tl.store(ref_c + tile * N + h, c_H, mask=live)
        tl.store(ref_key + tile * N + h, key_H, mask=live)
        tl.store(run + tile, (tl.max(high_H - low_H, 0) <= SAFE_RANGE).to(tl.int32))
        best_c_H = tl.where(high_H > best_H, c_H, best_c_H)
        best_key_H = tl.where(high_H > best_H, key_H, best_key_H)
        best_H, least_H = tl.maximum(high_H, best_H), tl.minimum(low_H, least_H)
    if tl.max(best_H - least_H, 0) <= SAFE_RANGE:
        for tile in range(first, end):
            tl.store(ref_c + tile * N + h, best_c_H, mask=live)
            tl.store(ref_key + tile * N + h, best_key_H, mask=live)
            tl.store(run + tile, end - tile)


@triton.jit
def delta_kernel(heads, d_heads, e_value, delta, rows, N, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """δ = dhead · (head − e^V) of ROWS of the S·B·N vectors."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    values = _rows(heads, row, D, rows, D, WIDTH).to(tl.float32) - _rows(e_value, row % N, D, N, D, WIDTH)
    tl.store(delta + row, tl.sum(values * _rows(d_heads, row, D, rows, D, WIDTH).to(tl.float32), 1), mask=row < rows)


@triton.jit
def _add_alone(
    S_MJ, v_JD, t, j, head_X, count, c, slopes, T, N,
    BM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Sums over a tile of keys, each head from its own scores, and the logarithm of their scale."""
    h = tl.arange(0, HEADS)
    sums_MX = tl.zeros((BM, HEADS * WIDTH), tl.float32)
    sums_MH = tl.zeros((BM, HEADS), tl.float32)
    scale_MH = tl.full((BM, HEADS), -FAR, tl.float32)
    v_JX = _operand(_weigh(tl.full((v_JD.shape[0], HEADS), 1.0, tl.float32), v_JD), DOT, ROUND)
    for i in range(count):
        own_MJ = _own_scores(S_MJ, t[:, None], j[None, :], i, c, slopes, T, N)
        r_M = tl.maximum(tl.max(own_MJ, 1), -FAR)
        P_MJ = tl.exp(own_MJ - r_M[:, None])
        own_JX = tl.where((head_X == i)[None, :], v_JX, 0.0).to(DOT)
        sums_MX += _product(_operand(P_MJ, DOT, ROUND), own_JX)
        sums_MH = tl.where((h == i)[None, :], tl.sum(P_MJ, 1)[:, None], sums_MH)
        scale_MH = tl.where((h == i)[None, :], r_M[:, None], scale_MH)
    return sums_MX, sums_MH, scale_MH


@triton.jit
def forward_kernel(
    q, k, v, c, ref_c, ref_key, run, spans, e_value, slopes, valid, documents, heads, lse,
    scale, q_batch, q_row, k_batch, k_row, v_batch, v_row, B, S, T, N, tiles,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Heads and lse of a tile of queries and a group of heads.

    `sums` over the keys that share a reference have one scale for each row, the running maximum of S; `total` over all keys has
    one for each row and head, log_MH.
    """
    block, group, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_head = group * HEADS
    row = block * BM + tl.arange(0, BM)
    t = T - S + row
    q, k, v = q + b.to(tl.int64) * q_batch, k + b.to(tl.int64) * k_batch, v + b.to(tl.int64) * v_batch
    c, ref_c, ref_key = _of_group(b, first_head, c, ref_c, ref_key, T, N, tiles)
    run += (b * tl.num_programs(1) + group) * tiles
    slopes, valid, documents = slopes + first_head, valid + b.to(tl.int64) * T, documents + b.to(tl.int64) * T
    count = tl.minimum(N - first_head, HEADS)
    h = tl.arange(0, HEADS)
    head_X, column_X, live_X = _columns(first_head, N, D, HEADS, WIDTH)
    q_MD = _rows(q, row, q_row, S, D, DEPTH).to(DOT)

    total_MX = tl.zeros((BM, HEADS * WIDTH), tl.float32)
    total_MH = tl.zeros((BM, HEADS), tl.float32)
    log_MH = tl.full((BM, HEADS), -FAR, tl.float32)
    tile, end = _key_span(spans, b, block, T, S, tiles, BM, BN, CAUSAL, PADDED or PACKED)
    while tile < end:
        sums_MX = tl.zeros((BM, HEADS * WIDTH), tl.float32)
        sums_MH = tl.zeros((BM, HEADS), tl.float32)
        shared = tl.load(run + tile)
        if shared == 0:
            j = tile * BN + tl.arange(0, BN)
            k_JD = _rows(k, j, k_row, T, D, DEPTH).to(DOT)
            S_MJ = _scores(q_MD, k_JD, scale, t[:, None], j[None, :], valid, documents, T, CAUSAL, PADDED, PACKED)
            v_JD = _rows(v, j, v_row, T, D, WIDTH)
            sums_MX, sums_MH, scale_MH = _add_alone(
                S_MJ, v_JD, t, j, head_X, count, c, slopes, T, N, BM, HEADS, WIDTH, DOT, ROUND
            )
            tile += 1
        else:
            c_H, key_H, slope_H = _reference(tile, ref_c, ref_key, slopes, count, N, HEADS, HEADS)
            r_M = tl.full((BM,), -FAR, tl.float32)
            last = tl.minimum(tile + shared, end)
            for current in range(tile, last):
                j = current * BN + tl.arange(0, BN)
                k_JD = _rows(k, j, k_row, T, D, DEPTH).to(DOT)
                S_MJ = _scores(q_MD, k_JD, scale, t[:, None], j[None, :], valid, documents, T, CAUSAL, PADDED, PACKED)
                w_JH = _key_weights(j, current, c, ref_c, ref_key, slopes, count, T, N, HEADS, HEADS)
                W_JX = _operand(_weigh(w_JH, _rows(v, j, v_row, T, D, WIDTH)), DOT, ROUND)
                higher_M = tl.maximum(tl.max(S_MJ, 1), r_M)
                P_MJ = _operand(tl.exp(S_MJ - higher_M[:, None]), DOT, ROUND)
                factor_M1 = tl.exp(r_M - higher_M)[:, None]
                sums_MX = sums_MX * factor_M1 + _product(P_MJ, W_JX)
                sums_MH = sums_MH * factor_M1 + _product(P_MJ, _operand(w_JH, DOT, ROUND))
                r_M = higher_M
            # Distances are exact and small near the diagonal, where attention is large.
            distance_MH = (t[:, None] - key_H[None, :]).to(tl.float32)
            scale_MH = r_M[:, None] + (c_H[None, :] - slope_H[None, :] * distance_MH)
            tile = last
        higher_MH = tl.maximum(log_MH, scale_MH)
        old_MH, new_MH = tl.exp(log_MH - higher_MH), tl.exp(scale_MH - higher_MH)
        total_MX = total_MX * _spread(old_MH, WIDTH) + sums_MX * _spread(new_MH, WIDTH)
        total_MH = total_MH * old_MH + sums_MH * new_MH
        log_MH = higher_MH

    seen_MH = total_MH > 0
    inverse_MH = tl.where(seen_MH, 1.0 / tl.where(seen_MH, total_MH, 1.0), 0.0)
    e_X = tl.load(e_value + column_X, mask=live_X, other=0.0)
    out_MX = total_MX * _spread(inverse_MH, WIDTH) + e_X[None, :]
    place = row.to(tl.int64) * B + b
    tl.store(
        heads + place[:, None] * (N * D) + column_X[None, :],
        out_MX.to(heads.dtype.element_ty),
        mask=(row < S)[:, None] & live_X[None, :],
    )
    lse_MH = tl.where(seen_MH, log_MH + tl.log(tl.where(seen_MH, total_MH, 1.0)), float("inf"))
    mask_MH = (row < S)[:, None] & (h < count)[None, :]
    tl.store(lse + place[:, None] * N + first_head + h[None, :], lse_MH, mask=mask_MH)


@triton.jit
def _key_span(spans, b, block, T, S, tiles, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, SPANNED: tl.constexpr):
    """First and end of the tiles of keys that a tile of queries may see."""
    if SPANNED:
        place = spans + (b * tl.cdiv(S, BM) + block) * 2
        first, end = tl.load(place), tl.load(place + 1)
    else:
        first, end = 0, tiles
        if CAUSAL:
            end = tl.minimum(tiles, tl.cdiv(T - S + (block + 1) * BM, BN))
    return first, end


@triton.jit
def _query_span(spans, b, tile, T, S, tiles, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, SPANNED: tl.constexpr):
    """First and end of the tiles of queries that may see a tile of keys."""
    if SPANNED:
        place = spans + (b * tiles + tile) * 2
        first, end = tl.load(place), tl.load(place + 1)
    else:
        first, end = 0, tl.cdiv(S, BM)
        if CAUSAL:
            first = tl.maximum(tile * BN - (T - S), 0) // BM
    return first, end


@triton.jit
def query_gradient_kernel(
    q, k, v, c, ref_c, ref_key, run, spans, slopes, valid, documents, d_heads, lse, delta, dq,
    scale, q_batch, q_row, k_batch, k_row, v_batch, v_row, B, S, T, N, tiles,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The contribution of a group of heads to the gradient of a tile of queries: dq (groups, B, S, D), float32."""
    SUMMED: tl.constexpr = HEADS if HEADS > 16 else 16
    block, group, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_head = group * HEADS
    row = block * BM + tl.arange(0, BM)
    t = T - S + row
    q, k, v = q + b.to(tl.int64) * q_batch, k + b.to(tl.int64) * k_batch, v + b.to(tl.int64) * v_batch
    c, ref_c, ref_key = _of_group(b, first_head, c, ref_c, ref_key, T, N, tiles)
    run += (b * tl.num_programs(1) + group) * tiles
    slopes, valid, documents = slopes + first_head, valid + b.to(tl.int64) * T, documents + b.to(tl.int64) * T
    lse, delta = lse + b * N + first_head, delta + b * N + first_head
    count = tl.minimum(N - first_head, HEADS)
    _head_X, column_X, live_X = _columns(first_head, N, D, HEADS, WIDTH)
    q_MD = _rows(q, row, q_row, S, D, DEPTH).to(DOT)
    place = row.to(tl.int64) * B + b
    mask_MX = (row < S)[:, None] & live_X[None, :]
    d_heads_MX = tl.load(d_heads + place[:, None] * (N * D) + column_X[None, :], mask=mask_MX, other=0.0)

    dq_MD = tl.zeros((BM, DEPTH), tl.float32)
    tile, end = _key_span(spans, b, block, T, S, tiles, BM, BN, CAUSAL, PADDED or PACKED)
    while tile < end:
        shared = tl.load(run + tile)
        if shared == 0:
            j = tile * BN + tl.arange(0, BN)
            k_JD = _rows(k, j, k_row, T, D, DEPTH).to(DOT)
            S_MJ = _scores(q_MD, k_JD, scale, t[:, None], j[None, :], valid, documents, T, CAUSAL, PADDED, PACKED)
            v_DJ = tl.trans(_rows(v, j, v_row, T, D, DEPTH).to(DOT))
            dS_MJ = tl.zeros((BM, BN), tl.float32)
            for i in range(count):
                lse_M = tl.load(lse + row.to(tl.int64) * B * N + i, mask=row < S, other=float("inf"))
                delta_M = tl.load(delta + row.to(tl.int64) * B * N + i, mask=row < S, other=0.0)
                own_MJ = _own_scores(S_MJ, t[:, None], j[None, :], i, c, slopes, T, N)
                A_MJ = tl.exp(own_MJ - lse_M[:, None])
                d_own_MD = _rows(d_heads + (b * N + first_head + i) * D, row, B * N * D, S, D, DEPTH).to(DOT)
                dS_MJ += A_MJ * (_product(d_own_MD, v_DJ) - delta_M[:, None])
            dq_MD += _product(_operand(dS_MJ, DOT, ROUND), k_JD)
            tile += 1
        else:
            r_M, phi_MH, d_sum_MR = _row_scales(
                row, t, tile, lse, delta, ref_c, ref_key, slopes, S, N, B * N, count, HEADS, HEADS
            )
            if SUMMED != HEADS:
                _r_M, _phi_MR, d_sum_MR = _row_scales(
                    row, t, tile, lse, delta, ref_c, ref_key, slopes, S, N, B * N, count, HEADS, SUMMED
                )
            G_MX = _operand(d_heads_MX.to(tl.float32) * _spread(phi_MH, WIDTH), DOT, ROUND)
            d_sum_MR = _operand(d_sum_MR, DOT, ROUND)
            last = tl.minimum(tile + shared, end)
            for current in range(tile, last):
                j = current * BN + tl.arange(0, BN)
                k_JD = _rows(k, j, k_row, T, D, DEPTH).to(DOT)
                S_MJ = _scores(q_MD, k_JD, scale, t[:, None], j[None, :], valid, documents, T, CAUSAL, PADDED, PACKED)
                w_JH = _key_weights(j, current, c, ref_c, ref_key, slopes, count, T, N, HEADS, HEADS)
                W_JX = _operand(_weigh(w_JH, _rows(v, j, v_row, T, D, WIDTH)), DOT, ROUND)
                if SUMMED != HEADS:
                    w_JH = _key_weights(j, current, c, ref_c, ref_key, slopes, count, T, N, HEADS, SUMMED)
                dP_MJ = _product(G_MX, tl.trans(W_JX)) - _product(d_sum_MR, tl.trans(_operand(w_JH, DOT, ROUND)))
                dS_MJ = tl.exp(S_MJ - r_M[:, None]) * dP_MJ
                dq_MD += _product(_operand(dS_MJ, DOT, ROUND), k_JD)
            tile = last
    d = tl.arange(0, DEPTH)
    place = ((group * B + b).to(tl.int64) * S + row) * D
    tl.store(dq + place[:, None] + d[None, :], dq_MD * scale, mask=(row < S)[:, None] & (d < D)[None, :])


@triton.jit
def key_gradient_kernel(
    q, k, v, c, ref_c, ref_key, run, spans, slopes, valid, documents, d_heads, lse, delta, dk, dv, dc,
    scale, q_batch, q_row, k_batch, k_row, v_batch, v_row, B, S, T, N, tiles,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A group's contribution to the gradients of a tile of keys: dk, dv (groups, B, T, D), and its dc (B, T, N), float32.

    Scores are computed with keys first, so that Pᵀ and dSᵀ are left operands without a transpose.
    """
    SUMMED: tl.constexpr = HEADS if HEADS > 16 else 16
    tile, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_head = group * HEADS
    j = tile * BN + tl.arange(0, BN)
    q, k, v = q + b.to(tl.int64) * q_batch, k + b.to(tl.int64) * k_batch, v + b.to(tl.int64) * v_batch
    c, ref_c, ref_key = _of_group(b, first_head, c, ref_c, ref_key, T, N, tiles)
    slopes, valid, documents = slopes + first_head, valid + b.to(tl.int64) * T, documents + b.to(tl.int64) * T
    lse, delta = lse + b * N + first_head, delta + b * N + first_head
    count = tl.minimum(N - first_head, HEADS)
    h = tl.arange(0, HEADS)
    head_X, column_X, live_X = _columns(first_head, N, D, HEADS, WIDTH)
    k_JD = _rows(k, j, k_row, T, D, DEPTH).to(DOT)
    v_JD = _rows(v, j, v_row, T, D, WIDTH)
    shared = tl.load(run + (b * tl.num_programs(1) + group) * tiles + tile)
    w_JH = _key_weights(j, tile, c, ref_c, ref_key, slopes, count, T, N, HEADS, HEADS)
    if shared == 0:
        w_JH = tl.full((BN, HEADS), 1.0, tl.float32)

    dW_JX = tl.zeros((BN, HEADS * WIDTH), tl.float32)
    dW_JH = tl.zeros((BN, HEADS), tl.float32)
    dk_JD = tl.zeros((BN, DEPTH), tl.float32)
    first, end = _query_span(spans, b, tile, T, S, tiles, BM, BN, CAUSAL, PADDED or PACKED)
    if shared == 0:
        v_all_JD = _rows(v, j, v_row, T, D, DEPTH).to(DOT)
        for block in range(first, end):
            row = block * BM + tl.arange(0, BM)
            t = T - S + row
            q_MD = _rows(q, row, q_row, S, D, DEPTH).to(DOT)
            S_JM = _scores(k_JD, q_MD, scale, t[None, :], j[:, None], valid, documents, T, CAUSAL, PADDED, PACKED)
            place = (row.to(tl.int64) * B + b)[:, None] * (N * D) + column_X[None, :]
            d_heads_MX = tl.load(d_heads + place, mask=(row < S)[:, None] & live_X[None, :], other=0.0)
            dS_JM = tl.zeros((BN, BM), tl.float32)
            for i in range(count):
                lse_M = tl.load(lse + row.to(tl.int64) * B * N + i, mask=row < S, other=float("inf"))
                delta_M = tl.load(delta + row.to(tl.int64) * B * N + i, mask=row < S, other=0.0)
                own_JM = _own_scores(S_JM, t[None, :], j[:, None], i, c, slopes, T, N)
                A_JM = tl.exp(own_JM - lse_M[None, :])
                d_own_MD = _rows(d_heads + (b * N + first_head + i) * D, row, B * N * D, S, D, DEPTH).to(DOT)
                dS_JM += A_JM * (_product(v_all_JD, tl.trans(d_own_MD)) - delta_M[None, :])
                own_MX = tl.where((head_X == i)[None, :], d_heads_MX, 0.0).to(DOT)
                dW_JX += _product(_operand(A_JM, DOT, ROUND), own_MX)
                d_sum_J = tl.sum(A_JM * delta_M[None, :], 1)
                dW_JH -= tl.where((h == i)[None, :], d_sum_J[:, None], 0.0)
            dk_JD += _product(_operand(dS_JM, DOT, ROUND), q_MD)
    else:
        W_JX = _operand(_weigh(w_JH, v_JD), DOT, ROUND)
        w_JR = _operand(_key_weights(j, tile, c, ref_c, ref_key, slopes, count, T, N, HEADS, SUMMED), DOT, ROUND)
        for block in range(first, end):
            row = block * BM + tl.arange(0, BM)
            t = T - S + row
            q_MD = _rows(q, row, q_row, S, D, DEPTH).to(DOT)
            S_JM = _scores(k_JD, q_MD, scale, t[None, :], j[:, None], valid, documents, T, CAUSAL, PADDED, PACKED)
            r_M, phi_MH, d_sum_MH = _row_scales(
                row, t, tile, lse, delta, ref_c, ref_key, slopes, S, N, B * N, count, HEADS, HEADS
            )
            d_sum_MR = d_sum_MH
            if SUMMED != HEADS:
                _r_M, _phi_MR, d_sum_MR = _row_scales(
                    row, t, tile, lse, delta, ref_c, ref_key, slopes, S, N, B * N, count, HEADS, SUMMED
                )
            place = (row.to(tl.int64) * B + b)[:, None] * (N * D) + column_X[None, :]
            d_heads_MX = tl.load(d_heads + place, mask=(row < S)[:, None] & live_X[None, :], other=0.0)
            G_MX = _operand(d_heads_MX.to(tl.float32) * _spread(phi_MH, WIDTH), DOT, ROUND)
            P_JM = tl.exp(S_JM - r_M[None, :])
            dP_JM = _product(W_JX, tl.trans(G_MX)) - _product(w_JR, tl.trans(_operand(d_sum_MR, DOT, ROUND)))
            dk_JD += _product(_operand(P_JM * dP_JM, DOT, ROUND), q_MD)
            P_JM = _operand(P_JM, DOT, ROUND)
            dW_JX += _product(P_JM, G_MX)
            dW_JH -= _product(P_JM, _operand(d_sum_MH, DOT, ROUND))

    dW_JHD = tl.reshape(dW_JX, (BN, HEADS, WIDTH))
    dv_JD = tl.sum(dW_JHD * w_JH[:, :, None], 1)
    dc_JH = w_JH * (tl.sum(dW_JHD * v_JD.to(tl.float32)[:, None, :], 2) + dW_JH)
    mask_J1 = (j < T)[:, None]
    tl.store(dc + (b.to(tl.int64) * T + j)[:, None] * N + first_head + h[None, :], dc_JH, mask=mask_J1 & (h < count)[None, :])
    place = ((group * B + b).to(tl.int64) * T + j)[:, None] * D
    d = tl.arange(0, WIDTH)
    tl.store(dv + place + d[None, :], dv_JD, mask=mask_J1 & (d < D)[None, :])
    d = tl.arange(0, DEPTH)
    tl.store(dk + place + d[None, :], dk_JD * scale, mask=mask_J1 & (d < D)[None, :])
