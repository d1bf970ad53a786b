"""Gram matrices of the heads of one layer, G_ij = x_i·x_j over flattened feature maps, differentiable and on every layout.

They are all that grouping heads needs (clustering.py, losses.py, voting.py). The feature maps themselves, n × T·D numbers or
n × T² attention weights, are neither kept nor sent. Sums over tokens are float32 or wider; the N × N numbers are float64, since
they are nearly equal for heads that differ by a small embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from model.heads import split_heads
from model.layers import Layers
from model.positions.positions import Positions

BLOCK = 2**22  # attention weights in memory at once


def gram(own_BNF: Tensor, layers: Layers) -> Tensor:
    """G_NN of all heads over this micro-batch, from the flattened maps (B, N, F) of this rank's heads.

    Ranks exchange heads for columns of the maps, so that each has all heads for its share of columns, and sum N × N numbers.
    """
    part_NN: Tensor = _Products.apply(_wide(layers.exchange_heads(own_BNF)))
    return layers.sum_parts(part_NN)


class _Products(torch.autograd.Function):
    """x (B, N, F) → Σ_b x_b x_bᵀ, float64, with one product in the backward pass where autograd has two."""

    @staticmethod
    def forward(ctx: Any, x_BNF: Tensor) -> Tensor:
        ctx.save_for_backward(x_BNF)
        return (x_BNF @ x_BNF.mT).sum(0).double()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x_BNF,) = ctx.saved_tensors
        g_NN = gradients[0]
        gradient_BNF: Tensor = (g_NN + g_NN.T).to(x_BNF.dtype) @ x_BNF
        return gradient_BNF


def output_gram(heads_SBF: Tensor, head_dim: int, layers: Layers) -> Tensor:
    """G_NN of the outputs of heads, concatenated as the output projection reads them, (S, B, N·D)."""
    return gram(split_heads(heads_SBF, head_dim).flatten(2), layers)


def value_gram(v_BNTD: Tensor, layers: Layers) -> Tensor:
    """G_NN of values when each head has its own."""
    return gram(v_BNTD.flatten(2), layers)


def added_value_gram(v_BKTD: Tensor, e_ND: Tensor, layers: Layers) -> Tensor:
    """G_NN of MHE-ADD's values v + e_i, from the shared v (B, 1, T, D) and the embeddings of all heads.

    G_ij = Σ|v|² + Σv·(e_i + e_j) + B·T e_i·e_j: no head's values are materialized, and ranks do not communicate.
    """
    v_TD = _wide(layers.part_of_sum(v_BKTD)).flatten(0, -2)
    sums_D, e_ND = v_TD.sum(0).double(), e_ND.double()
    along_N = e_ND @ sums_D
    return v_TD.square().sum().double() + along_N[:, None] + along_N + v_TD.shape[0] * (e_ND @ e_ND.T)


def multiplied_value_gram(v_BKTD: Tensor, e_ND: Tensor, layers: Layers) -> Tensor:
    """G_NN of MHE-MUL's values v ⊙ (1 + e_i): G_ij = Σ_c m_c (1 + e_ic)(1 + e_jc), m_c = Σ v_c² over tokens."""
    v_TD = _wide(layers.part_of_sum(v_BKTD)).flatten(0, -2)
    squares_D, scales_ND = v_TD.square().sum(0).double(), 1 + e_ND.double()
    return (scales_ND * squares_D) @ scales_ND.T


def attention_gram(
    queries: Callable[[Tensor], Tensor],
    k_BKSD: Tensor,
    positions: Positions,
    *,
    heads: int,
    scale: float,
    rows: int,
    layers: Layers,
) -> Tensor:
    """G_NN of the attention weights of `rows` evenly spaced queries of each sequence, including the last; 0 for all queries.

    `queries` computes those of some rows (R,) for this rank's `heads`, (B, N, R, D). Works in blocks of rows that the backward
    pass recomputes, so that at most `BLOCK` weights, or those of one row, are in memory at once.
    """
    batch, _, length, _ = k_BKSD.shape
    count = min(rows or length, length)
    chosen_R = (torch.arange(1, count + 1, device=k_BKSD.device) * length).div(count, rounding_mode="floor") - 1
    at_once = max(1, BLOCK // (batch * heads * length))

    def of_block(rows_R: Tensor) -> Tensor:
        weights_BNRT = attention_weights(queries(rows_R), k_BKSD, positions, rows_R, scale)
        return gram(weights_BNRT.flatten(2), layers)

    if count <= at_once or not torch.is_grad_enabled():
        parts = [of_block(block_R) for block_R in chosen_R.split(at_once)]
    else:
        parts = [checkpoint(of_block, block_R, use_reentrant=False) for block_R in chosen_R.split(at_once)]
    return torch.stack(parts).sum(0)


def attention_weights(q_BNRD: Tensor, k_BKTD: Tensor, positions: Positions, rows_R: Tensor, scale: float) -> Tensor:
    """softmax of the scores of the queries `rows_R`, (B, N, R, T), float32 or wider; zeros for a query that sees no key."""
    q_BKRD = (_wide(q_BNRD) * scale).unflatten(1, (k_BKTD.shape[1], -1)).flatten(2, 3)
    scores_BNRT = (q_BKRD @ _wide(k_BKTD).mT).view(*q_BNRD.shape[:3], -1)
    if positions.slopes_N is not None:
        keys_T = torch.arange(k_BKTD.shape[2], device=rows_R.device)
        scores_BNRT = scores_BNRT - positions.slopes_N[:, None, None] * (rows_R[:, None] - keys_T)
    if positions.visible is not None:
        hidden_B1RT = ~positions.visible[:, :, rows_R]
        if positions.blind is not None:  # otherwise their softmax and its gradient are NaN
            hidden_B1RT &= ~positions.blind[:, :, rows_R]
        scores_BNRT = scores_BNRT.masked_fill_(hidden_B1RT, -math.inf)
    weights_BNRT = scores_BNRT.softmax(-1)
    return weights_BNRT if positions.blind is None else weights_BNRT.masked_fill(positions.blind[:, :, rows_R], 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
