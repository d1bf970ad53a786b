"""Gram matrices of the heads of one layer, G_ij = x_i·x_j over flattened feature maps, differentiable and on every layout.

All that grouping heads needs follows from them (clustering.py, losses.py, voting.py): feature maps themselves, n × T·D numbers
or n × T² of attention weights, are neither kept nor sent. Sums over tokens are float32 or wider; the N × N numbers are float64,
since heads that differ by a small embedding have nearly equal ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.layers import Layers
from model.positions import Positions

BLOCK = 2**22  # attention weights that are there at once


def gram(own_NF: Tensor, layers: Layers) -> Tensor:
    """G_NN of all heads from the flattened maps (N, F) of this rank's heads.

    Ranks exchange heads for columns of the maps, so that each has all heads of a share of them, and add up N × N numbers.
    """
    shared_NF = layers.exchange_heads(own_NF)
    wide_NF = shared_NF.to(torch.promote_types(shared_NF.dtype, torch.float32))
    return layers.sum_parts((wide_NF @ wide_NF.T).double())


def output_gram(heads_SBF: Tensor, head_dim: int, layers: Layers) -> Tensor:
    """Of heads side by side as the output projection reads them, (S, B, N·D)."""
    return gram(heads_SBF.unflatten(-1, (-1, head_dim)).permute(2, 0, 1, 3).flatten(1), layers)


def value_gram(v_BNTD: Tensor, layers: Layers) -> Tensor:
    """Of the values of heads that have values of their own."""
    return gram(v_BNTD.transpose(0, 1).flatten(1), layers)


def added_value_gram(v_BKTD: Tensor, e_ND: Tensor, layers: Layers) -> Tensor:
    """Of MHE-ADD's values v + e_i, from the one v (B, 1, T, D) of all heads and the embeddings of all heads.

    G_ij = Σ|v|² + Σv·(e_i + e_j) + B·T e_i·e_j: no head's values are made, and no rank asks another.
    """
    v_TD = _wide(layers.part_of_sum(v_BKTD)).flatten(0, -2)
    sums_D, e_ND = v_TD.sum(0).double(), e_ND.double()
    along_N = e_ND @ sums_D
    return v_TD.square().sum().double() + along_N[:, None] + along_N + v_TD.shape[0] * (e_ND @ e_ND.T)


def multiplied_value_gram(v_BKTD: Tensor, e_ND: Tensor, layers: Layers) -> Tensor:
    """Of MHE-MUL's values v ⊙ (1 + e_i): G_ij = Σ_c m_c (1 + e_ic)(1 + e_jc), m_c = Σ v_c² over tokens."""
    v_TD = _wide(layers.part_of_sum(v_BKTD)).flatten(0, -2)
    squares_D, scales_ND = v_TD.square().sum(0).double(), 1 + e_ND.double()
    return (scales_ND * squares_D) @ scales_ND.T


def attention_gram(q_BNSD: Tensor, k_BKSD: Tensor, positions: Positions, scale: float, rows: int, layers: Layers) -> Tensor:
    """Of the attention weights of `rows` evenly spaced queries of each sequence, 0 for all; the last query is one of them.

    In blocks of queries that the backward pass computes again, so that at most `BLOCK` weights are there at once, or those of
    one query.
    """
    batch, heads, length, _ = q_BNSD.shape
    count = min(rows or length, length)
    chosen_R = (torch.arange(1, count + 1, device=q_BNSD.device) * length).div(count, rounding_mode="floor") - 1
    at_once = max(1, BLOCK // (batch * heads * length))
    total: Tensor | None = None
    for block_R in chosen_R.split(at_once):
        arguments = (q_BNSD, k_BKSD, positions, block_R, scale, layers)
        if count > at_once and torch.is_grad_enabled():
            part: Tensor = checkpoint(_block_gram, *arguments, use_reentrant=False)
        else:
            part = _block_gram(*arguments)
        total = part if total is None else total + part
    assert total is not None
    return total


def _block_gram(q_BNSD: Tensor, k_BKSD: Tensor, positions: Positions, rows_R: Tensor, scale: float, layers: Layers) -> Tensor:
    weights_BNRT = attention_weights(q_BNSD[:, :, rows_R], k_BKSD, positions, rows_R, scale)
    return gram(weights_BNRT.transpose(0, 1).flatten(1), layers)


def attention_weights(q_BNRD: Tensor, k_BKTD: Tensor, positions: Positions, rows_R: Tensor, scale: float) -> Tensor:
    """softmax of the scores of the queries `rows_R`, (B, N, R, T), float32 or wider; zeros for a query that sees no key."""
    q_BNRD, k_BKTD = _wide(q_BNRD), _wide(k_BKTD)
    q_BKGRD = q_BNRD.unflatten(1, (k_BKTD.shape[1], -1))
    scores_BNRT = (q_BKGRD @ k_BKTD[:, :, None].transpose(-1, -2)).flatten(1, 2) * scale
    if positions.slopes_N is not None:
        keys_T = torch.arange(k_BKTD.shape[2], device=rows_R.device)
        scores_BNRT = scores_BNRT - positions.slopes_N[:, None, None] * (rows_R[:, None] - keys_T)
    if positions.visible is None:
        return scores_BNRT.softmax(-1)
    visible_B1RT = positions.visible[:, :, rows_R]
    sees_B1R1 = visible_B1RT.any(-1, keepdim=True)
    weights_BNRT = scores_BNRT.masked_fill(~visible_B1RT & sees_B1R1, -math.inf).softmax(-1)
    return weights_BNRT.masked_fill(~sees_B1R1, 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
