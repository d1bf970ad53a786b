"""What tensor parallelism moves between ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from configs.schema import ModelConfig
from model.attention.registry import attention_variant
from model.costs.parameters import norm_vectors

Gather = Literal["activations", "weights"]
Part = Literal["embedding", "attention", "mlp", "loss"]
Pass = Literal["fwd", "bwd"]
Op = Literal["all_reduce", "all_gather", "reduce_scatter"]


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


def mhe_gather(config: ModelConfig, tokens: int, sequence: bool) -> Gather:
    """What to gather for a projection that all heads read (sha, mhe_*): what sends fewer bytes, the weights if both are equal.

    `tokens` are those of one micro-batch, micro_batch_size * sequence_length; `sequence` says whether there is sequence
    parallelism. The number of ranks and the type of values do not matter. Variants without such a projection get "weights".
    """
    moves = _Moves(config, tokens, sequence, bytes_per_value=1)
    weights, activations = (sum(sent_bytes(move, tensor=2) for move in moves.shared(way)) for way in ("weights", "activations"))
    return "weights" if weights <= activations else "activations"


def sent_bytes(collective: Collective, tensor: int) -> float:
    """Bytes that one of `tensor` ranks sends with a ring algorithm: an all_reduce is a reduce_scatter and an all_gather."""
    rounds = 2 if collective.op == "all_reduce" else 1
    return rounds * (tensor - 1) * collective.bytes / tensor


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
        return self._replicated(part, norm_vectors(self.config))

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
