"""FLOPs of a training step and of attention alone."""

from __future__ import annotations

from configs.schema import ModelConfig
from model.attention.registry import layer_kinds, projections_of, variant_of
from model.costs.parameters import mlp_matrices, vocabulary
from model.registry import model_kind


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of one training token, forward and backward, averaged over a sequence.

    Model FLOPs as used for MFU: matrix products only, two for a multiply-add, and twice the forward for the backward pass.
    In a causal model attention counts the causal half: a token attends to (sequence_length + 1) / 2 keys on average, with a
    sliding window to those in it. Scores and
    values count for all num_heads heads, as in the definition, even if heads share them and they are computed once (sha,
    mhe_add). Extra work of an implementation (recomputed activations, the wider key features of embedding_position before)
    does not count.
    """
    return 3 * 2 * (_projections(config) + _scores_and_values(config, sequence_length))


def executed_flops_per_token(config: ModelConfig, sequence_length: int, shares_scores: bool) -> float:
    """FLOPs that one training token takes, as `flops_per_token`, but with the products that attention kernels compute.

    Those are the ones of `shared_scores_cost` or of `head_by_head_cost`, whose backward pass computes QKᵀ again. Tiles that are
    masked only in part, and scores that Triton's kernels compute for each group of heads, do not count.
    """
    attention = 0
    for layer, count in layer_kinds(config).items():
        pairs = attention_pairs(sequence_length, model_kind(config.kind).causal, layer.sliding_window)
        windowed = layer.sliding_window is not None and layer.sliding_window < sequence_length
        plain = not windowed and not layer.attention_sinks and layer.logit_softcap is None
        if shares_scores and plain and "shared_scores" in variant_of(layer).kernels:
            flops, _ = shared_scores_cost(layer.num_heads // layer.num_seeds, layer.head_width, pairs, backward=True)
            attention += count * layer.num_seeds * flops
        else:
            queries, values = variant_of(layer).products(layer)
            attention += count * 2 * pairs * (4 * queries + 3 * values)
    return 3 * 2 * _projections(config) + attention / sequence_length


def _projections(config: ModelConfig) -> int:
    """Multiply-adds of one token in all matrices of the model, forward."""
    hidden, heads_width = config.hidden_size, config.num_heads * config.head_width
    attention = config.num_layers * hidden * heads_width  # output projections
    for layer, count in layer_kinds(config).items():
        projections = projections_of(layer).values()
        attention += count * sum(one.columns * (one.inputs or hidden) for one in projections)
    mlp = hidden * config.ffn_width * mlp_matrices(config)
    return attention + config.num_layers * mlp + hidden * vocabulary(config)


def _scores_and_values(config: ModelConfig, sequence_length: int) -> int:
    """Multiply-adds of one token with its keys and values, forward."""
    causal, products = model_kind(config.kind).causal, 0
    for layer, count in layer_kinds(config).items():
        pairs = attention_pairs(sequence_length, causal, layer.sliding_window)
        products += count * pairs * sum(variant_of(layer).products(layer))
    return round(products / sequence_length)


def attention_pairs(tokens: int, causal: bool = True, window: int | None = None) -> int:
    """Pairs of a query and a key it attends to, in one sequence; in a causal one with a `window` not those beyond it."""
    if not causal:
        return tokens * tokens
    reached = tokens if window is None else min(window, tokens)
    return reached * (reached + 1) // 2 + (tokens - reached) * reached


def head_by_head_cost(num_heads: int, head_dim: int, pairs: int, backward: bool) -> tuple[int, int]:
    """(FLOPs, exponentials) of attention with separate scores for each head, without projections.

    Two matrix products forward and five backward, which recomputes QKᵀ; a multiply-add counts two. `backward`: both passes.
    """
    products, exponentials = (7, 2) if backward else (2, 1)
    return 2 * products * pairs * num_heads * head_dim, exponentials * pairs * num_heads


def shared_scores_cost(num_heads: int, head_dim: int, pairs: int, backward: bool) -> tuple[int, int]:
    """(FLOPs, exponentials) of the heads of a seed of MHE-ADD with one softmax matrix, without projections and weights of keys.

    Forward: QKᵀ once, and P W, n(d + 1) wide. Backward: QKᵀ again, dq, dk and two wide products. `backward`: both passes.
    """
    narrow, wide = (4, 3) if backward else (1, 1)
    columns = narrow * head_dim + wide * num_heads * (head_dim + 1)
    return 2 * pairs * columns, (2 if backward else 1) * pairs
