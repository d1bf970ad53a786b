"""Every collective of one rank in one optimizer step: how often, how many bytes, and behind what an engine hides it.

As the engines issue them, counted in real steps (docs/memory.md): DeepSpeed 0.19's ZeRO and pipelines, torch's FSDP, and the
tensor-parallel ones of model/costs/communication.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from configs.schema import Config
from model.attention.registry import layer_configs
from model.costs.communication import collectives
from model.costs.memory import ZERO3_UNSHARDED
from model.costs.parameters import parameters
from pretrain.engines import engine
from pretrain.planning.memory import BUCKET
from pretrain.planning.pieces import Shape
from pretrain.planning.stage import Stage, data_ranks, micro_batches, stages_of

ALIGNED = 2  # values: where a rank's share of ZeRO 1 and 2 may begin, DeepSpeed's nccl_start_alignment_factor
SIGNALS = 2  # that the loop shares: pretrain/loop/interruption.py
HOOKS = 3  # of a plain run: skipped steps, checkpoints, validation


@dataclass(frozen=True)
class Transfer:
    """All collectives of one kind on one axis in one optimizer step, of one rank.

    `axis`: tensor, shard, replicate, data, pipeline or loop (all ranks). `bytes` is the size of the full tensor, summed over
    `calls`: the operand of an all_reduce, the output of an all_gather, the input of a reduce_scatter, what a send or a broadcast
    moves. `group`: how many ranks take part. `hidden_by`: the pass that it can overlap with in its engine, empty if nothing does.
    """

    axis: str
    op: str
    part: str
    calls: int
    bytes: int
    group: int
    hidden_by: str = ""

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a ring algorithm; an all_reduce is a reduce_scatter plus an all_gather."""
        if self.op in ("send", "broadcast"):
            return float(self.bytes)
        return (2 if self.op == "all_reduce" else 1) * (self.group - 1) * self.bytes / self.group


def transfers(config: Config, ranks: int, stage: int = 0) -> list[Transfer]:
    """Those of a rank of one pipeline stage of a resolved configuration; none of a group of one rank."""
    found = _Step(config, ranks, stages_of(config, gpu=True), stage).all()
    return [transfer for transfer in found if transfer.group > 1 and transfer.calls]


class _Step:
    def __init__(self, config: Config, ranks: int, stages: Sequence[Stage], number: int) -> None:
        self.config, self.ranks, self.number, self.stage = config, ranks, number, stages[number]
        self.parallel, self.bf16 = config.parallel, config.training.precision != "fp32"
        self.sharding = engine(config.backend).sharding(config.parallel)
        self.data, self.count = data_ranks(config, ranks), micro_batches(config, ranks)
        self.wide = 2 if self.bf16 else 4
        starts = [0]
        for each in stages:
            starts.append(starts[-1] + sum(each.blocks))
        self.layers = layer_configs(config.model)[starts[number] : starts[number + 1]]

    def all(self) -> Iterator[Transfer]:
        yield from self._tensor()
        if self.sharding == "fsdp":
            yield from self._fsdp()
        else:
            yield from self._zero()
        if self.parallel.pipeline > 1:
            yield from self._pipeline()
        # The mean weight of the labels, before the first forward pass, and what the loop shares after the step.
        yield Transfer("loop", "all_reduce", "metrics", 2, 8 * (2 + SIGNALS + HOOKS), self.ranks)

    def _tensor(self) -> Iterator[Transfer]:
        """Of every micro-batch. Column-parallel layers sum the gradient of their input while they compute those of weights."""
        from pretrain.distributed.layers import gathered  # loads torch

        config, parallel = self.config, self.parallel
        moves = collectives(
            config.model,
            parallel.tensor,
            parallel.sequence,
            gathered(config),
            config.training.micro_batch_size,
            config.row_length,
            self.wide,
            layers=self.layers,
            ends=(self.stage.first, self.stage.last),
            recompute=config.training.recompute_activations,
        )
        for move in moves:
            hidden = "backward" if move.pass_ == "bwd" and move.op != "all_gather" and move.part != "embedding" else ""
            calls, size = self.count * move.calls, self.count * move.bytes
            yield Transfer("tensor", move.op, move.part, calls, size, parallel.tensor, hidden)
        if config.training.z_loss and self.stage.last:
            tokens = config.training.micro_batch_size * config.row_length
            yield Transfer("tensor", "all_reduce", "loss", 2 * self.count, 2 * self.count * tokens * 4, parallel.tensor)

    def _norm(self, axis: str, calls: int, size: int, group: int) -> Transfer:
        return Transfer(axis, "all_reduce", "norm", calls, size * calls, group)

    def _zero(self) -> Iterator[Transfer]:
        values, groups = self.stage.values, self.stage.groups(self.config)
        if self.sharding == "zero3":
            yield from self._zero3(groups)
        elif self.sharding == "zero0":
            calls = -(-values // BUCKET)
            yield Transfer("data", "all_reduce", "gradients", calls, 4 * values, self.data)  # after the backward pass
        elif self.sharding == "zero1" and self.bf16:
            calls = -(-values // BUCKET)
            yield Transfer("data", "all_reduce", "gradients", calls, 4 * values, self.data)  # after the backward pass
            yield from self._updated(groups)
        else:
            times = self.count if self.sharding == "zero2" else 1
            yield from self._buckets(self._bucket(), times, "all_reduce", "data")
            yield from self._updated(groups)
        yield from self._zero_norms(len(groups))

    def _updated(self, groups: Sequence[Sequence[Shape]]) -> Iterator[Transfer]:
        """Each rank's share of the new weights, after the optimizer's step."""
        multiple, bucket, calls, size = ALIGNED * self.data, self._bucket(), 0, 0
        for group in groups:
            padded = -(-sum(shape.values for shape in group) // multiple) * multiple
            calls += max(1, padded // bucket)
            size += self.wide * padded
        yield Transfer("data", "all_gather", "weights", calls, size, self.data)

    def _zero_norms(self, groups: int) -> Iterator[Transfer]:
        tensor, pipeline = self.parallel.tensor, self.parallel.pipeline
        if self.sharding == "zero0":
            yield self._norm("tensor", 1, 8, tensor)
            yield self._norm("pipeline", 1, 8, pipeline)
            return
        if not (self.sharding == "zero1" and self.bf16):
            yield self._norm("data", groups, 8 if self.sharding == "zero3" else 4, self.data)
        else:
            groups = 1
        axis = "pipeline" if pipeline > 1 else "tensor"
        yield self._norm(axis, groups, 8 if self.sharding == "zero3" else 4, tensor * pipeline)

    def _zero3(self, groups: Sequence[Sequence[Shape]]) -> Iterator[Transfer]:
        large = [shape for shape in self.stage.parameters if shape.values > ZERO3_UNSHARDED]
        small = [shape for shape in self.stage.parameters if shape.values <= ZERO3_UNSHARDED]
        of_large = self.wide * sum(map(self._padded, large))
        yield Transfer("data", "all_gather", "weights", self.count * 2, self.count * of_large, self.data, "forward")
        yield from self._buckets(self._bucket(), self.count, "reduce_scatter", "data")
        of_small = self.wide * sum(map(self._padded, small))
        yield Transfer("data", "all_gather", "weights", len(small), of_small, self.data)

    def _padded(self, shape: Shape) -> int:
        return -(-shape.values // self.data) * self.data

    def _bucket(self) -> int:
        own = sum(parameters(self.config.model).values()) // (self.parallel.tensor * self.parallel.pipeline)
        return min(BUCKET, own + own % 2)

    def _buckets(self, bucket: int, times: int, op: str, axis: str) -> Iterator[Transfer]:
        """Gradients, in fp32. A full bucket is sent while the backward pass goes on, the last one after it."""
        filled, sizes = 0, list[int]()
        for shape in reversed(self.stage.parameters):
            if filled and filled + shape.values > bucket:
                sizes.append(filled)
                filled = 0
            filled += shape.values
        sizes.append(filled)
        overlaps = self.parallel.pipeline == 1
        early = sum(sizes[:-1])
        hidden = "backward" if overlaps else ""
        yield Transfer(axis, op, "gradients", times * (len(sizes) - 1), times * 4 * early, self.data, hidden)
        yield Transfer(axis, op, "gradients", times, times * 4 * sizes[-1], self.data)

    def _fsdp(self) -> Iterator[Transfer]:
        """A block is gathered for each pass, the rest for both at once; gradients of both are reduced after every micro-batch."""
        replicas, shards = self.parallel.replicate, self.data // self.parallel.replicate
        blocks = [piece.parameters for piece, is_block in zip(self.stage.pieces, self.stage.blocks, strict=True) if is_block]
        sizes = [sum(_sharded(shape, shards) for shape in shapes) for shapes in blocks]
        around, inside, count = sum(_sharded(shape, shards) for shape in self.stage.around), sum(sizes), self.count
        number, wide = len(sizes), self.wide
        yield Transfer("shard", "all_gather", "weights", count, count * wide * around, shards)  # nothing runs before
        for pass_ in ("forward", "backward"):
            yield Transfer("shard", "all_gather", "weights", count * number, count * wide * inside, shards, pass_)
        yield Transfer("shard", "reduce_scatter", "gradients", count * number, count * 4 * inside, shards, "backward")
        yield Transfer("shard", "reduce_scatter", "gradients", count, count * 4 * around, shards)  # nothing runs after
        yield Transfer("replicate", "all_reduce", "gradients", number, 4 * inside // shards, replicas, "backward")
        yield Transfer("replicate", "all_reduce", "gradients", 1, 4 * around // shards, replicas)
        yield self._norm("shard", 1, 8, shards)
        yield self._norm("tensor", 1, 8, self.parallel.tensor)

    def _pipeline(self) -> Iterator[Transfer]:
        """DeepSpeed's stages wait for what they send and receive."""
        config, tensor, stages = self.config, self.parallel.tensor, self.parallel.pipeline
        size = config.training.micro_batch_size * config.row_length * config.model.hidden_size * self.wide // tensor
        neighbours = int(not self.stage.last) + int(not self.stage.first)
        yield Transfer("pipeline", "send", "activations", self.count * neighbours, self.count * neighbours * size, 2)
        if config.model.tie_embeddings and (self.stage.first or self.stage.last):
            embedding = next(shape for shape in self.stage.parameters if shape.name == "token_embedding.weight")
            yield Transfer("pipeline", "all_reduce", "embedding", 1, 4 * embedding.values, 2)
        yield Transfer("pipeline", "broadcast", "metrics", 1, 8, stages)
        yield Transfer("pipeline", "all_reduce", "metrics", 1, 16, stages)
        if self.stage.last:
            yield Transfer("data", "all_reduce", "metrics", 1, 4, self.data)


def _sharded(shape: Shape, shards: int) -> int:
    """Values of all ranks' shards: as many rows on each, the last ones zeros."""
    return shape.values // shape.rows * (-(-shape.rows // shards) * shards)


def added_up(found: Iterable[Transfer]) -> list[Transfer]:
    """One entry for each axis, kind and group, whatever hides it."""
    sums: dict[tuple[str, str, int], Transfer] = {}
    for one in found:
        key = one.axis, one.op, one.group
        so_far = sums.get(key, replace(one, part="", calls=0, bytes=0, hidden_by=""))
        sums[key] = replace(so_far, calls=so_far.calls + one.calls, bytes=so_far.bytes + one.bytes)
    return list(sums.values())
