"""Floating-point operations of a training step and of attention by itself."""

from __future__ import annotations

from configs.schema import ModelConfig
from model.attention.registry import attention_variant
from model.costs.parameters import mlp_matrices, vocabulary


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of one training token, forward and backward, averaged over a sequence.

    Model FLOPs, for MFU: a multiplication and an addition count two, the backward pass twice the forward, and only matrix
    products count. Attention counts the causal half: a token meets (sequence_length + 1) / 2 keys on average. Scores and values
    count for all num_heads heads, as the definition has them, also where they are equal and computed once (sha, mhe_add). What
    an implementation does on top (recomputed activations, wider key features of embedding_position before) does not count.
    """
    hidden, heads_width = config.hidden_size, config.num_heads * config.head_width
    attention = hidden * (attention_variant(config.attention).projected(config) + heads_width)
    mlp = hidden * config.ffn_width * mlp_matrices(config)
    products = config.num_layers * (attention + mlp) + hidden * vocabulary(config)
    scores_and_values = config.num_layers * heads_width * (sequence_length + 1)  # two products with (T + 1) / 2 keys
    return 3 * 2 * (products + scores_and_values)


def attention_pairs(tokens: int, causal: bool = True) -> int:
    """Pairs of a query and a key that it sees, in one sequence."""
    return tokens * (tokens + 1) // 2 if causal else tokens * tokens


def head_by_head_cost(num_heads: int, head_dim: int, pairs: int, backward: bool) -> tuple[int, int]:
    """(FLOPs, exponentials) of attention whose heads have scores of their own, without projections.

    Two matrix products forward, five backward, QKᵀ again among them; a multiplication and an addition count two. `backward`:
    both passes.
    """
    products, exponentials = (7, 2) if backward else (2, 1)
    return 2 * products * pairs * num_heads * head_dim, exponentials * pairs * num_heads


def shared_scores_cost(num_heads: int, head_dim: int, pairs: int, backward: bool) -> tuple[int, int]:
    """(FLOPs, exponentials) of MHE-ADD by one softmax matrix, without projections; the weights of keys are not counted.

    Forward QKᵀ once and P W, n(d + 1) wide; backward QKᵀ again, dq, dk and two wide products.
    """
    narrow, wide = (4, 3) if backward else (1, 1)
    columns = narrow * head_dim + wide * num_heads * (head_dim + 1)
    return 2 * pairs * columns, (2 if backward else 1) * pairs
