"""What one rank holds at the moment of a step when it holds most.

State is by the formulas of model/costs/memory.py, activations as counted in pretrain/planning/counting.py, buffers as the
engines allocate them (docs/memory.md). Nothing here needs a GPU or other ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from configs.schema import Config
from model.costs.memory import ZERO3_UNSHARDED, StateBytes, average_bytes, overhang, state_bytes
from pretrain.engines import engine
from pretrain.planning.stage import Stage, data_ranks, micro_batches, stages_of

BUCKET = 500_000_000  # values of DeepSpeed's buckets at most (pretrain/backends/deepspeed.py)
PREFETCHED = 50_000_000  # values that ZeRO 3 gathers ahead: DeepSpeed's stage3_prefetch_bucket_size
AVAILABLE = 1_000_000_000  # values that ZeRO 3 keeps gathered at most: its stage3_max_live_parameters and _max_reuse_distance

# Allowances for GPUs; none was measured.
FRAGMENTATION = 0.05  # of all that tensors hold
CONTEXT = 2**30  # CUDA context, NCCL's buffers and cuBLAS's workspaces


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the peak moment of a step, by what holds them.

    `weights`: the shard or copy that stays, not gathered ones. `logits`: what follows the blocks, loss included. `buffers`: the
    engine's, gathered weights among them. `fragmentation`: an allowance for what no tensor holds. `host` is not part of the
    total: what a rank of a GPU keeps in the machine's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    average: int
    fragmentation: int
    host: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self)) - self.host


def rank_memory(config: Config, ranks: int, stage: int | None = None, gpu: bool = True) -> RankMemory:
    """Of a resolved configuration on `ranks` ranks; of one stage of its pipeline, or of the one that needs most.

    `gpu`: with the kernels and buffers of GPUs; else those of CPUs, without allowances.
    """
    stages = stages_of(config, gpu)
    numbers = range(len(stages)) if stage is None else [stage]
    moments = [moment for number in numbers for moment in _Rank(config, ranks, stages[number], number, gpu).moments()]
    return max(moments, key=lambda moment: moment.total)


class _Rank:
    def __init__(self, config: Config, ranks: int, stage: Stage, number: int, gpu: bool) -> None:
        self.config, self.stage, self.gpu = config, stage, gpu
        self.parallel, self.bf16 = config.parallel, config.training.precision != "fp32"
        self.sharding = engine(config.backend).sharding(config.parallel)
        self.data, self.wide = data_ranks(config, ranks), 2 if self.bf16 else 4
        self.pieces = [
            piece.recomputed() if is_block and config.training.recompute_activations else piece
            for piece, is_block in zip(stage.pieces, stage.blocks, strict=True)
        ]
        count = micro_batches(config, ranks)
        self.in_flight = min(self.parallel.pipeline - number, count)  # micro-batches, of which one is in its backward pass
        self.state = self._state()

    def moments(self) -> Iterator[RankMemory]:
        found = self._fsdp() if self.sharding == "fsdp" else self._deepspeed()
        for moment in found:
            yield self._with_allowances(moment)

    def _state(self) -> StateBytes:
        stage, kept = self.stage, self.stage.kept(self.config)
        unsharded = sum(shape.values for shape in stage.parameters if shape.values <= ZERO3_UNSHARDED)
        over = 0
        if self.sharding in ("zero1", "zero2") and not self.bf16:
            sizes = [shape.values for shape in stage.parameters]
            over = overhang(sizes, self.data, 0) if self.data <= 16 else max(0, max(sizes) - stage.values // self.data)
        return state_bytes(kept, self.sharding, self.data // self.parallel.replicate, self.bf16, unsharded, over)

    def _with_allowances(self, moment: RankMemory) -> RankMemory:
        values = self.stage.values
        average, host = average_bytes(self.config.training.average, values, self.data), 0
        if self.config.training.average.last is not None and self.gpu:
            average, host = 0, average
        moment = replace(moment, average=average)
        if self.parallel.cpu_offload and self.gpu:
            host += moment.optimizer + (moment.weights + moment.gradients if self.sharding == "fsdp" else 0)
            moment = replace(moment, optimizer=0)
            if self.sharding == "fsdp":
                moment = replace(moment, weights=0, gradients=0)
        if self.gpu:
            moment = replace(moment, fragmentation=round(FRAGMENTATION * moment.total) + CONTEXT)
        return replace(moment, host=host)

    def _activations(self) -> Iterator[tuple[int, int, int, bool]]:
        """(number of the piece, activations, logits, whether backward) at the moments when there are most of them."""
        others = (self.in_flight - 1) * (sum(piece.kept for piece in self.pieces))
        before, last = self.stage.shared + others, len(self.pieces) - 1
        for number, piece in enumerate(self.pieces):
            ends = self.stage.last and number >= self._first_after_blocks()
            for most, backward in ((piece.forward, False), (piece.backward, True)):
                yield number, before + (0 if ends else most), most if ends else 0, backward
            before += piece.kept
        assert last >= 0

    def _first_after_blocks(self) -> int:
        return max(number for number, is_block in enumerate(self.stage.blocks) if is_block) + 1

    def _tied(self, number: int, backward: bool) -> int:
        """The gradient of a tied output layer, which waits for that of the embedding."""
        return self.wide * self.stage.tied if backward and number < len(self.pieces) - 1 else 0

    def _moment(self, gradients: int, activations: int, logits: int, buffers: int) -> RankMemory:
        state = self.state
        return RankMemory(state.parameters, gradients, state.optimizer, activations, logits, buffers, 0, 0)

    def _deepspeed(self) -> Iterator[RankMemory]:
        state, values = self.state, self.stage.values
        bucket = self._bucket()
        grows = 2 if self.gpu and self.parallel.pipeline == 1 and self.sharding in ("zero1", "zero2") else 1
        narrow = self.wide if self.sharding in ("zero1", "zero2") else 4
        collecting = grows * narrow * bucket if self._collects() else 0
        always = collecting if self.sharding == "zero3" else 0
        for number, activations, logits, backward in self._activations():
            buffers = (collecting if backward else always) + self._gathered_by_zero3(number, backward)
            yield self._moment(state.accumulated, activations + self._tied(number, backward), logits, buffers)
        reduced = min(values, BUCKET)
        sent = {"zero0": 4 * reduced, "zero1": 4 * reduced, "zero2": (2 + 4 if self.bf16 else 4) * reduced, "zero3": 8 * reduced}
        yield self._moment(state.accumulated, 0, 0, collecting + sent[self.sharding])
        yield self._moment(state.stepped, 0, 0, always)

    def _collects(self) -> bool:
        """Whether DeepSpeed collects gradients in a bucket: its optimizer for bf16 at stage 1 does not, nor stage 0."""
        return self.sharding in ("zero2", "zero3") or (self.sharding == "zero1" and not self.bf16)

    def _bucket(self) -> int:
        from model.costs.parameters import parameters

        own = sum(parameters(self.config.model).values()) // (self.parallel.tensor * self.parallel.pipeline)
        return min(BUCKET, own + own % 2)

    def _gathered_by_zero3(self, number: int, backward: bool) -> int:
        if self.sharding != "zero3":
            return 0
        large = sum(shape.values for shape in self.stage.parameters if shape.values > ZERO3_UNSHARDED)
        flat = 0 if backward else min(large, PREFETCHED)
        return self.wide * (min(large, AVAILABLE) + flat)

    def _fsdp(self) -> Iterator[RankMemory]:
        """Gathered are what is around the blocks and two of these: one that computes, one that comes next."""
        state, around = self.state, sum(shape.values for shape in self.stage.around)
        for number, activations, logits, backward in self._activations():
            own, buffers = self.pieces[number].values if self.stage.blocks[number] else 0, self.wide * around
            step = -1 if backward else 1
            neighbour = number + step
            inside = 0 <= neighbour < len(self.pieces) and self.stage.blocks[neighbour]
            nearby = self.pieces[neighbour].values if inside else 0
            buffers += self.wide * (own + nearby)
            yield self._moment(state.accumulated, activations + self._tied(number, backward), logits, buffers)
            if backward:
                yield self._moment(state.accumulated, activations + self._tied(number, backward), logits, buffers)
        yield self._moment(state.stepped, 0, 0, 0)
