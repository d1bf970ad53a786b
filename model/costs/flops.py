"""FLOPs of a training step and of attention alone."""

from __future__ import annotations

from configs.schema import ModelConfig
from model.attention.faults import may_share_scores
from model.attention.registry import layer_kinds, projections_of, variant_of
from model.costs.parameters import mlp_matrices, vocabulary
from model.registry import model_kind


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of one training token, forward and backward, averaged over a sequence.

    Model FLOPs as used for MFU: matrix products only, two for a multiply-add, and twice the forward for the backward pass.
    In a causal model attention counts the causal half: a token attends to (sequence_length + 1) / 2 keys on average, with a
    sliding window to those in it. Scores and values count for all num_heads heads, as in the definition, even if heads share
    them and they are computed once (sha, mhe_add). Extra work of an implementation (recomputed activations, the wider key
    features of embedding_position before) does not count.
    """
    return 3 * 2 * (_projections(config) + _scores_and_values(config, sequence_length))


def executed_flops_per_token(config: ModelConfig, sequence_length: int, shares_scores: bool, recomputes: bool = False) -> float:
    """FLOPs that one training token takes, as `flops_per_token`, but with the products that attention kernels compute.

    Those are the ones of `attention_cost`, whose backward pass computes QKᵀ again. Tiles that are masked only in part, scores
    that Triton's kernels compute for each group of heads, and what wider features add (diff, embedding_position before) do not
    count. `recomputes`: blocks run a second time in the backward pass (training.recompute_activations).
    """
    attention = 0
    for layer, count in layer_kinds(config).items():
        pairs, shares = layer_pairs(layer, sequence_length), shares_scores and may_share_scores(layer)
        along = 2 * _along_sequence(layer, sequence_length)
        attention += count * (attention_cost(layer, pairs, backward=True, shares_scores=shares)[0] + 3 * along)
        if recomputes:
            attention += count * (attention_cost(layer, pairs, backward=False, shares_scores=shares)[0] + along)
    again = 2 * _recomputed_projections(config) if recomputes else 0
    return 3 * 2 * _projections(config) + again + attention / sequence_length


def _recomputed_projections(config: ModelConfig) -> int:
    """Multiply-adds of one token in the matrices of all blocks.

    Recomputation ends with what the backward pass needs last: the input of the MLP's last matrix, or, with dropout, its output.
    """
    blocks = _projections(config) - config.hidden_size * vocabulary(config)
    return blocks if config.dropout else blocks - config.num_layers * config.hidden_size * config.ffn_width


def _projections(config: ModelConfig) -> int:
    """Multiply-adds of one token in all matrices of the model, forward."""
    hidden, heads_width = config.hidden_size, config.num_heads * config.head_width
    attention = config.num_layers * hidden * heads_width  # output projections
    for layer, count in layer_kinds(config).items():
        attention += count * sum(one.values(hidden, bias=False) for one in projections_of(layer).values())
    mlp = hidden * config.ffn_width * mlp_matrices(config)
    return attention + config.num_layers * mlp + hidden * vocabulary(config)


def _scores_and_values(config: ModelConfig, sequence_length: int) -> int:
    """Multiply-adds of one token with its keys and values, forward, averaged over a sequence."""
    of_sequence = 0
    for layer, count in layer_kinds(config).items():
        of_pairs = layer_pairs(layer, sequence_length) * sum(variant_of(layer).products(layer))
        of_sequence += count * (of_pairs + _along_sequence(layer, sequence_length))
    return round(of_sequence / sequence_length)


def layer_pairs(layer: ModelConfig, tokens: int) -> int:
    """Pairs of a query and a key of one layer, in one sequence."""
    projected = variant_of(layer).projected_keys
    if projected is not None:
        return tokens * projected(layer)
    return attention_pairs(tokens, model_kind(layer.kind).causal, layer.sliding_window)


def _along_sequence(layer: ModelConfig, tokens: int) -> int:
    """Multiply-adds that project keys and values along one sequence, forward: each has a product with every projected one."""
    variant = variant_of(layer)
    return 0 if variant.projected_keys is None else tokens * variant.projected_keys(layer) * sum(variant.products(layer))


def attention_pairs(tokens: int, causal: bool = True, window: int | None = None) -> int:
    """Pairs of a query and a key it attends to, in one sequence; in a causal one with a `window` not those beyond it."""
    if not causal:
        return tokens * tokens
    reached = tokens if window is None else min(window, tokens)
    return reached * (reached + 1) // 2 + (tokens - reached) * reached


def attention_cost(layer: ModelConfig, pairs: int, backward: bool, shares_scores: bool) -> tuple[int, int]:
    """(FLOPs, exponentials) of a layer's attention without projections, with separate scores for each head or shared ones.

    Separate scores: QKᵀ and PV forward; backward QKᵀ again and two products for the gradients of each of the two factors. A
    multiply-add counts two. `backward`: both passes.
    """
    if shares_scores:
        of_a_seed = shared_scores_cost(layer.num_heads // layer.num_seeds, layer.head_width, pairs, backward)
        return layer.num_seeds * of_a_seed[0], layer.num_seeds * of_a_seed[1]
    queries, values = variant_of(layer).products(layer)
    columns = 4 * queries + 3 * values if backward else queries + values
    return 2 * pairs * columns, (2 if backward else 1) * pairs * layer.num_heads * variant_of(layer).softmaxes


def shared_scores_cost(num_heads: int, head_dim: int, pairs: int, backward: bool) -> tuple[int, int]:
    """(FLOPs, exponentials) of the heads of a seed of MHE-ADD with one softmax matrix, without projections and weights of keys.

    Forward: QKᵀ once, and P W, n(d + 1) wide. Backward: QKᵀ again, dq, dk and two wide products. `backward`: both passes.
    """
    narrow, wide = (4, 3) if backward else (1, 1)
    columns = narrow * head_dim + wide * num_heads * (head_dim + 1)
    return 2 * pairs * columns, (2 if backward else 1) * pairs
