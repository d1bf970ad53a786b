"""The collectives of tensor parallelism: how often they run and how many bytes they move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from configs.schema import ModelConfig
from model.attention.registry import layer_configs, projections_of, replicated_vectors, variant_of
from model.attention.variant import Projection
from model.costs.parameters import norm_vectors
from model.positions.registry import position_kind

Gather = Literal["activations", "weights"]
Part = Literal["embedding", "attention", "mlp", "loss"]
Pass = Literal["fwd", "bwd"]
Op = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one part of the model and one pass.

    `bytes` is the size of the full tensor, summed over `calls`: the operand of an all_reduce, the output of an all_gather, the
    input of a reduce_scatter.
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
    layers: Sequence[ModelConfig] | None = None,
    ends: tuple[bool, bool] = (True, True),
    recompute: bool = False,
) -> list[Collective]:
    """All tensor-parallel collectives of one micro-batch, forward and backward, as model/parallel/tensor.py issues them.

    Counts the full model with labels, without z-loss (docs/objectives.md): one entry for each part, pass and kind. A norm
    counts towards the part after it, the final norm and the output layer towards the loss, positions towards the embedding.

    A stage of a pipeline has some `layers`, and one or none of the `ends`: the embedding, and the output layer with the loss.
    With `recompute` blocks run their forward pass again in the backward pass, but for what follows the last thing it needs.

    `tensor` is the number of ranks, one of `tensor_sizes`; with `sequence` it divides sequence_length. `gather` is what
    mhe_gather returns. `bytes_per_value` applies to weights and activations; bf16 by default. A single rank moves nothing.
    """
    if tensor == 1:
        return []
    moves = _Moves(config, micro_batch_size * sequence_length, sequence, bytes_per_value)
    own = layer_configs(config) if layers is None else layers
    blocks = [move for layer in own for move in (*moves.attention(layer, tensor, gather), *moves.mlp())]
    if recompute:
        blocks += [move for layer in own for move in moves.again(layer, tensor, gather)]
    first = moves.embedding(sequence_length) if ends[0] else []
    return _added_up([*first, *blocks, *(moves.loss() if ends[1] else [])])


def mhe_gather(config: ModelConfig, tokens: int, sequence: bool) -> Gather:
    """What ranks gather for a projection that all heads read (sha, mhe_*): whichever sends fewer bytes, weights on a tie.

    `tokens` is micro_batch_size * sequence_length; `sequence` says whether sequence parallelism is on. The result depends
    neither on the number of ranks nor on the dtype. Variants without such a projection get "weights".
    """
    moves = _Moves(config, tokens, sequence, bytes_per_value=1)
    shared = [one for layer in layer_configs(config) for one in variant_of(layer).of_kind(layer, "shared")]

    def sent(way: Gather) -> float:
        return sum(sent_bytes(move, tensor=2) for one in shared for move in moves.shared(one, way))

    return "weights" if sent("weights") <= sent("activations") else "activations"


def sent_bytes(collective: Collective, tensor: int) -> float:
    """Bytes that each of `tensor` ranks sends in a ring algorithm; an all_reduce is a reduce_scatter plus an all_gather."""
    rounds = 2 if collective.op == "all_reduce" else 1
    return rounds * (tensor - 1) * collective.bytes / tensor


class _Moves:
    """The collectives of a micro-batch of `tokens` on two or more ranks, call by call; docs/communication.md lists them."""

    def __init__(self, config: ModelConfig, tokens: int, sequence: bool, bytes_per_value: int) -> None:
        self.config, self.tokens, self.sequence, self.value = config, tokens, sequence, bytes_per_value
        self.hidden = tokens * config.hidden_size * bytes_per_value

    def embedding(self, sequence_length: int) -> list[Collective]:
        moves = self._row("embedding")
        if self.sequence and position_kind(self.config).has_table:
            moves.append(_call("embedding", "bwd", "all_gather", sequence_length * self.config.hidden_size * self.value))
        return moves

    def attention(self, layer: ModelConfig, tensor: int, gather: Gather) -> list[Collective]:
        projections, moves = projections_of(layer).values(), self._norm("attention")
        shared = [one for one in projections if one.is_gathered(tensor)]
        joint = [one for one in projections if one.kind != "expand" and one not in shared]
        for one in shared:
            moves += self.shared(one, gather)
        if joint:
            moves += self._column("attention")
        for one in projections:
            moves += self._weights(one.columns) if one.kind == "key_value" and one.parts % tensor else []
        if embeddings := variant_of(layer).embeddings(layer):
            moves.append(_call("attention", "bwd", "all_gather", embeddings * self.value))
        if layer.attention_sinks:
            moves.append(_call("attention", "bwd", "all_gather", layer.num_heads * self.value))
        moves += [_call("attention", "bwd", "all_reduce", size * max(4, self.value)) for size in replicated_vectors(layer)]
        return [*moves, *self._row("attention"), *self._row_bias("attention")]

    def mlp(self) -> list[Collective]:
        return [*self._norm("mlp"), *self._column("mlp"), *self._row("mlp"), *self._row_bias("mlp")]

    def again(self, layer: ModelConfig, tensor: int, gather: Gather) -> list[Collective]:
        """What recomputing a block repeats, in the backward pass. Without dropout nothing needs the sum after the MLP."""
        mlp = self.mlp()
        kept = mlp if self.config.dropout else [move for move in mlp if move not in self._row("mlp")[:1]]
        forward = [move for move in (*self.attention(layer, tensor, gather), *kept) if move.pass_ == "fwd"]
        return [replace(move, pass_="bwd") for move in forward]

    def loss(self) -> list[Collective]:
        """Cross-entropy needs one maximum and two sums over the vocabulary, in float32 whatever the model's dtype."""
        softmax = [_call("loss", "fwd", "all_reduce", self.tokens * 4)] * 3
        return [*self._norm("loss"), *self._column("loss"), *softmax]

    def shared(self, projection: Projection, gather: Gather) -> list[Collective]:
        """A projection that heads of several ranks read; all its outputs end up on every rank."""
        columns = projection.columns
        outputs = self.tokens * columns * self.value
        full = _call("attention", "fwd", "all_gather", outputs)
        if gather == "activations":
            return [*self._column("attention"), full, _call("attention", "bwd", "reduce_scatter", outputs)]
        if self.sequence:
            return [*self._weights(columns), full, _call("attention", "bwd", "reduce_scatter", outputs)]
        return [*self._weights(columns)[:1], _call("attention", "bwd", "all_reduce", outputs)]

    def _weights(self, columns: int) -> list[Collective]:
        """Gather weights and biases of `columns` outputs; reduce-scatter their gradients."""
        full = columns * (self.config.hidden_size + self.config.bias) * self.value
        return [_call("attention", "fwd", "all_gather", full), _call("attention", "bwd", "reduce_scatter", full)]

    def _column(self, part: Part) -> list[Collective]:
        """Column-parallel layers that read one hidden state; sequence parallelism gathers it again for the weight gradients."""
        if not self.sequence:
            return [_call(part, "bwd", "all_reduce", self.hidden)]
        return [
            _call(part, "fwd", "all_gather", self.hidden),
            _call(part, "bwd", "all_gather", self.hidden),
            _call(part, "bwd", "reduce_scatter", self.hidden),
        ]

    def _row(self, part: Part) -> list[Collective]:
        """Row-parallel layers: sum all ranks' contributions to the hidden state."""
        if not self.sequence:
            return [_call(part, "fwd", "all_reduce", self.hidden)]
        return [_call(part, "fwd", "reduce_scatter", self.hidden), _call(part, "bwd", "all_gather", self.hidden)]

    def _row_bias(self, part: Part) -> list[Collective]:
        return self._replicated(part, 1) if self.config.bias else []

    def _norm(self, part: Part) -> list[Collective]:
        return self._replicated(part, norm_vectors(self.config))

    def _replicated(self, part: Part, vectors: int) -> list[Collective]:
        """Gradients of replicated parameters, `vectors` times the hidden width, which each rank has for its own tokens only.

        They are reduced in float32 or wider.
        """
        if not self.sequence:
            return []
        return [_call(part, "bwd", "all_reduce", vectors * self.config.hidden_size * max(4, self.value))]


def _call(part: Part, pass_: Pass, op: Op, size: int) -> Collective:
    return Collective(part, pass_, op, calls=1, bytes=size)


def _added_up(moves: Iterable[Collective]) -> list[Collective]:
    """One entry for each part, pass and kind, in order of first appearance."""
    sums: dict[tuple[Part, Pass, Op], Collective] = {}
    for move in moves:
        key = move.part, move.pass_, move.op
        so_far = sums.get(key, replace(move, calls=0, bytes=0))
        sums[key] = replace(move, calls=so_far.calls + move.calls, bytes=so_far.bytes + move.bytes)
    return list(sums.values())
