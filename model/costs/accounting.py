"""What a resolved model costs, as formulas: parameters, FLOPs, cache, memory, what tensor parallelism moves. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from configs.schema import ModelConfig
from model.attention.registry import attention_variant

Gather = Literal["activations", "weights"]
Part = Literal["embedding", "attention", "mlp", "loss"]
Pass = Literal["fwd", "bwd"]
Op = Literal["all_reduce", "all_gather", "reduce_scatter"]
Sharding = Literal["zero0", "zero1", "zero2", "zero3", "fsdp"]

ZERO3_WHOLE = 100_000  # DeepSpeed's stage3_param_persistence_threshold: parameters of so many values or fewer stay whole


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one part of the model and one pass.

    `bytes` is the size of the whole tensor, summed over `calls`: what an all_reduce reduces, the gathered output of an
    all_gather, the whole input of a reduce_scatter.
    """

    part: Part
    pass_: Pass
    op: Op
    calls: int
    bytes: int


@dataclass(frozen=True)
class StateBytes:
    """The training state that one rank keeps, in bytes: no activations, no buffers of the engine.

    `parameters`: those it computes with, and no gathered ones. `accumulated`: gradients between two micro-batches of a step;
    `stepped`: gradients when the optimizer begins. `optimizer`: two moments of AdamW and, unless the parameters are those, fp32
    master weights.
    """

    parameters: int
    accumulated: int
    stepped: int
    optimizer: int


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, together the whole model; `embeddings` of tokens and positions, `output` 0 when tied."""
    hidden, layers = config.hidden_size, config.num_layers
    norm = hidden * _norm_vectors(config)
    return {
        "embeddings": hidden * (_vocab(config) + (config.max_position_embeddings or 0)),
        "attention": layers * _attention(config),
        "mlp": layers * _mlp(config),
        "norms": (2 * layers + 1) * norm,
        "output": 0 if config.tie_embeddings else hidden * _vocab(config),
    }


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of one training token, forward and backward, averaged over a sequence.

    Model FLOPs, for MFU: a multiplication and an addition count two, the backward pass twice the forward, and only matrix
    products count. Attention counts the causal half: a token meets (sequence_length + 1) / 2 keys on average. Scores and values
    count for all num_heads heads, as the definition has them, also where they are equal and computed once (sha, mhe_add). What
    an implementation does on top (recomputed activations, wider key features of embedding_position before) does not count.
    """
    hidden, heads_width = config.hidden_size, config.num_heads * config.head_width
    attention = hidden * (attention_variant(config.attention).projected(config) + heads_width)
    mlp = hidden * config.ffn_width * _mlp_matrices(config)
    products = config.num_layers * (attention + mlp) + hidden * _vocab(config)
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


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that one token of one sequence adds to the cache over all layers; bf16 unless said otherwise.

    What is key and value at once (skv, el) is kept once; an odd num_heads rounds up.
    """
    return 2 * attention_variant(config.attention).kv_heads(config) * config.head_width * config.num_layers * bytes_per_value


def state_bytes(values: int, sharding: Sharding, ranks: int, bf16: bool, whole: int = 0, overhang: int = 0) -> StateBytes:
    """The state of AdamW training sharded over `ranks` data-parallel ranks, gradients summed in fp32.

    `values` are the parameters of one replica, or of one rank's part of it with tensor or pipeline parallelism. The plan is
    that of Rajbhandari et al. 2020 (arXiv 1910.02054), section 3; what DeepSpeed 0.19 does beyond it was measured:

    zero0           everything whole; the parameters are the optimizer's. No bf16: ValueError.
    zero1, fp32     the share's master weights are a second copy. Gradients are whole until the last micro-batch; then only what
                    overlaps the share stays, `overhang` values more than it, and the optimizer reads a flat copy of the share.
    zero1, bf16     gradients are whole and kept twice: their fp32 sum, always there, and the last micro-batch's in bf16.
    zero2           as zero1 in fp32, from the first micro-batch on; in bf16 the share exactly, and no copy.
    zero3           bf16 or fp32 parameters are cut, and those of at most ZERO3_WHOLE values, together `whole`, also kept whole
                    until the optimizer runs (one rank alone has no need to). Gradients are cut; the optimizer reads a copy.
    fsdp            all of it cut, fp32; computing in bf16 changes nothing here. `ranks` are those of one replica.
    """
    share, narrow = -(-values // ranks), 2 if bf16 else 4
    overlapping = share if bf16 else share + overhang
    match sharding:
        case "zero0":
            if bf16:
                raise ValueError("ZeRO 0 has no bf16")
            return StateBytes(4 * values, 4 * values, 4 * values, 8 * values)
        case "zero1" if bf16:
            return StateBytes(2 * values, 6 * values, 6 * values, 12 * share)
        case "zero1" | "zero2":
            accumulated = 4 * (values if sharding == "zero1" else overlapping)
            return StateBytes(narrow * values, accumulated, 4 * (overlapping + (0 if bf16 else share)), 12 * share)
        case "zero3":
            return StateBytes(narrow * (share + (whole if ranks > 1 else 0)), 4 * share, 8 * share, 12 * share)
        case "fsdp":
            return StateBytes(4 * share, 4 * share, 4 * share, 8 * share)


def overhang(sizes: Sequence[int], ranks: int, rank: int) -> int:
    """By how many values the parameters that overlap a rank's share exceed it, where ZeRO cuts them laid end to end.

    `sizes` of the parameters of one optimizer group in their order; shares are equal, the last is filled up.
    """
    share = -(-sum(sizes) // ranks)
    start, end = rank * share, min((rank + 1) * share, sum(sizes))
    overlapping = before = 0
    for size in sizes:
        if before < end and before + size > start:
            overlapping += size
        before += size
    return overlapping - max(0, end - start)


def sent_bytes(collective: Collective, tensor: int) -> float:
    """Bytes that one of `tensor` ranks sends with a ring algorithm: an all_reduce is a reduce_scatter and an all_gather."""
    rounds = 2 if collective.op == "all_reduce" else 1
    return rounds * (tensor - 1) * collective.bytes / tensor


def mhe_gather(config: ModelConfig, tokens: int, sequence: bool) -> Gather:
    """What to gather for a projection that all heads read (sha, mhe_*): what sends fewer bytes, the weights if both are equal.

    `tokens` are those of one micro-batch, micro_batch_size * sequence_length; `sequence` says whether there is sequence
    parallelism. The number of ranks and the type of values do not matter. Variants without such a projection get "weights".
    """
    moves = _Moves(config, tokens, sequence, bytes_per_value=1)
    weights, activations = (sum(sent_bytes(move, tensor=2) for move in moves.shared(way)) for way in ("weights", "activations"))
    return "weights" if weights <= activations else "activations"


def collectives(
    config: ModelConfig,
    tensor: int,
    sequence: bool,
    gather: Gather,
    micro_batch_size: int,
    sequence_length: int,
    bytes_per_value: int = 2,
) -> list[Collective]:
    """All tensor-parallel collectives of forward and backward of one micro-batch, as model/parallel/tensor.py does them.

    For the whole model with labels and without recomputed activations; one entry for each part, pass and kind. A norm counts to
    the part that it precedes, the final one and the output layer to the loss, positions to the embedding.

    `tensor` is the number of ranks, one of registry.tensor_sizes, and divides sequence_length with `sequence`; `gather` is an
    answer of mhe_gather; weights and activations have `bytes_per_value`, bf16 unless said otherwise. One rank alone moves
    nothing.
    """
    if tensor == 1:
        return []
    moves = _Moves(config, micro_batch_size * sequence_length, sequence, bytes_per_value)
    layer = [*moves.attention(tensor, gather), *moves.mlp()]
    return _added_up([*moves.embedding(sequence_length), *config.num_layers * layer, *moves.loss()])


class _Moves:
    """The collectives of a micro-batch of `tokens` over two or more ranks, call by call; docs/communication.md lists them."""

    def __init__(self, config: ModelConfig, tokens: int, sequence: bool, bytes_per_value: int) -> None:
        self.config, self.tokens, self.sequence, self.value = config, tokens, sequence, bytes_per_value
        self.hidden = tokens * config.hidden_size * bytes_per_value

    def embedding(self, sequence_length: int) -> list[Collective]:
        moves = self._row("embedding")
        if self.sequence and self.config.position == "learned":
            moves.append(_call("embedding", "bwd", "all_gather", sequence_length * self.config.hidden_size * self.value))
        return moves

    def attention(self, tensor: int, gather: Gather) -> list[Collective]:
        config, variant = self.config, attention_variant(self.config.attention)
        shared, heads, embeddings = variant.shared(config), variant.key_value_heads(config), variant.embeddings(config)
        moves = self._norm("attention")
        if shared:
            moves += self.shared(gather)
        if variant.projected(config) > shared:
            moves += self._column("attention")
        if heads % tensor:
            moves += self._weights(2 * heads * config.head_width)
        if embeddings:
            moves.append(_call("attention", "bwd", "all_gather", embeddings * self.value))
        return [*moves, *self._row("attention"), *self._row_bias("attention")]

    def mlp(self) -> list[Collective]:
        return [*self._norm("mlp"), *self._column("mlp"), *self._row("mlp"), *self._row_bias("mlp")]

    def loss(self) -> list[Collective]:
        """Cross-entropy takes a maximum and two sums over the vocabulary, in float32 whatever the model's type."""
        softmax = [_call("loss", "fwd", "all_reduce", self.tokens * 4)] * 3
        return [*self._norm("loss"), *self._column("loss"), *softmax]

    def shared(self, gather: Gather) -> list[Collective]:
        """The projection that all heads read, from the hidden state to its outputs on every rank."""
        columns = attention_variant(self.config.attention).shared(self.config)
        outputs = self.tokens * columns * self.value
        whole = _call("attention", "fwd", "all_gather", outputs)
        if gather == "activations":
            return [*self._column("attention"), whole, _call("attention", "bwd", "reduce_scatter", outputs)]
        if self.sequence:
            return [*self._weights(columns), whole, _call("attention", "bwd", "reduce_scatter", outputs)]
        return [*self._weights(columns)[:1], _call("attention", "bwd", "all_reduce", outputs)]

    def _weights(self, columns: int) -> list[Collective]:
        """Weights and biases of `columns` outputs of the hidden state, gathered; parts of their gradients added up."""
        whole = columns * (self.config.hidden_size + self.config.bias) * self.value
        return [_call("attention", "fwd", "all_gather", whole), _call("attention", "bwd", "reduce_scatter", whole)]

    def _column(self, part: Part) -> list[Collective]:
        """Column-parallel layers that read the same hidden state; sequence parallelism gathers it again for their weights."""
        if not self.sequence:
            return [_call(part, "bwd", "all_reduce", self.hidden)]
        return [
            _call(part, "fwd", "all_gather", self.hidden),
            _call(part, "bwd", "all_gather", self.hidden),
            _call(part, "bwd", "reduce_scatter", self.hidden),
        ]

    def _row(self, part: Part) -> list[Collective]:
        """The sum of what all ranks add to the hidden state."""
        if not self.sequence:
            return [_call(part, "fwd", "all_reduce", self.hidden)]
        return [_call(part, "fwd", "reduce_scatter", self.hidden), _call(part, "bwd", "all_gather", self.hidden)]

    def _row_bias(self, part: Part) -> list[Collective]:
        return self._replicated(part, 1) if self.config.bias else []

    def _norm(self, part: Part) -> list[Collective]:
        return self._replicated(part, _norm_vectors(self.config))

    def _replicated(self, part: Part, vectors: int) -> list[Collective]:
        """Gradients of parameters as wide as the hidden state that each rank has for its tokens; summed in float32 or wider."""
        if not self.sequence:
            return []
        return [_call(part, "bwd", "all_reduce", vectors * self.config.hidden_size * max(4, self.value))]


def _call(part: Part, pass_: Pass, op: Op, size: int) -> Collective:
    return Collective(part, pass_, op, calls=1, bytes=size)


def _added_up(moves: Iterable[Collective]) -> list[Collective]:
    """One entry for each part, pass and kind, in the order of their first."""
    sums: dict[tuple[Part, Pass, Op], Collective] = {}
    for move in moves:
        key = move.part, move.pass_, move.op
        so_far = sums.get(key, replace(move, calls=0, bytes=0))
        sums[key] = replace(move, calls=so_far.calls + move.calls, bytes=so_far.bytes + move.bytes)
    return list(sums.values())


def _attention(config: ModelConfig) -> int:
    """One attention layer with its output projection."""
    variant, hidden, bias = attention_variant(config.attention), config.hidden_size, int(config.bias)
    projections = variant.projected(config) * (hidden + bias)
    output = config.num_heads * config.head_width * hidden + bias * hidden
    return projections + variant.embeddings(config) + output


def _mlp(config: ModelConfig) -> int:
    inner = (_mlp_matrices(config) - 1) * config.ffn_width
    weights = config.hidden_size * config.ffn_width * _mlp_matrices(config)
    return weights + (inner + config.hidden_size if config.bias else 0)


def _mlp_matrices(config: ModelConfig) -> int:
    return 3 if config.activation == "swiglu" else 2


def _norm_vectors(config: ModelConfig) -> int:
    """Parameters of a norm as a multiple of the hidden width."""
    return 2 if config.norm == "layernorm" and config.bias else 1


def _vocab(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("the configuration is not resolved: vocab_size is null")
    return config.vocab_size
