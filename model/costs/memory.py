"""Bytes of a rank's training state and of the key/value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.schema import AverageConfig, ModelConfig
from model.attention.registry import layer_kinds, variant_of

Sharding = Literal["zero0", "zero1", "zero2", "zero3", "fsdp"]

ZERO3_UNSHARDED = (
    100_000  # DeepSpeed's stage3_param_persistence_threshold: parameters of at most this many values stay unsharded
)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of training state on one rank, without activations and the engine's own buffers.

    `parameters`: the copy that forward and backward read, not counting gathered ones. `accumulated`: gradients between two
    micro-batches of a step; `stepped`: gradients when the optimizer starts. `optimizer`: its state, as AdamW's two moments, and
    fp32 master weights if they are a separate copy.
    """

    parameters: int
    accumulated: int
    stepped: int
    optimizer: int


def state_bytes(
    kept: Mapping[int, int], sharding: Sharding, ranks: int, bf16: bool, unsharded: int = 0, overhang: int = 0
) -> StateBytes:
    """Training state, sharded over `ranks` data-parallel ranks, with gradients reduced in fp32.

    `kept` is the number of parameters of one replica, or of one rank's shard of it under tensor or pipeline parallelism, by the
    bytes of state that the optimizer keeps of each: with AdamW, 8 for all. The scheme is that of Rajbhandari et al. 2020 (arXiv
    1910.02054), section 3; DeepSpeed 0.19's deviations from it were measured:

    zero0           nothing is sharded; the optimizer updates the parameters themselves. ValueError with bf16.
    zero1, fp32     each rank's shard has master weights as a second copy. Gradients are unsharded until the last micro-batch;
                    then only parameters that overlap the shard keep theirs, `overhang` values more than the shard itself, and
                    the optimizer reads a flat copy of the shard.
    zero1, bf16     gradients are unsharded and kept twice: their fp32 sum, always, and those of the last micro-batch in bf16.
    zero2           as zero1 in fp32, but from the first micro-batch on; in bf16 exactly the shard, without a copy.
    zero3           parameters are sharded, in bf16 or fp32. Those of at most ZERO3_UNSHARDED values, `unsharded` in total, are
                    also kept unsharded until the optimizer runs (not on a single rank). Gradients are sharded; the optimizer
                    reads a copy.
    fsdp            everything is sharded and fp32, also with bf16. `ranks` are those of one replica.
    """
    values, shards = sum(kept.values()), {each: -(-count // ranks) for each, count in kept.items()}
    shard, narrow = sum(shards.values()), 2 if bf16 else 4
    state = sum(each * count for each, count in shards.items())
    overlapping = shard if bf16 else shard + overhang
    match sharding:
        case "zero0":
            if bf16:
                raise ValueError("ZeRO 0 has no bf16")
            return StateBytes(4 * values, 4 * values, 4 * values, sum(each * count for each, count in kept.items()))
        case "zero1" if bf16:
            return StateBytes(2 * values, 6 * values, 6 * values, 4 * shard + state)
        case "zero1" | "zero2":
            accumulated = 4 * (values if sharding == "zero1" else overlapping)
            return StateBytes(narrow * values, accumulated, 4 * (overlapping + (0 if bf16 else shard)), 4 * shard + state)
        case "zero3":
            return StateBytes(narrow * (shard + (unsharded if ranks > 1 else 0)), 4 * shard, 8 * shard, 4 * shard + state)
        case "fsdp":
            return StateBytes(4 * shard, 4 * shard, 4 * shard, state)


def average_bytes(average: AverageConfig, values: int, ranks: int) -> int:
    """What a rank keeps for an average of the weights, in fp32: on their device with `decay`, in host memory with `last`.

    `values` is the number of parameters as in `state_bytes`. `ranks` are all data-parallel ones, whatever the engine shards:
    those that hold the same parts take turns, parameter by parameter. With `last` this is at a save; until the next one there
    is one set of weights less.
    """
    copies = 1 if average.decay is not None else average.last or 0
    return 4 * copies * -(-values // ranks)


def overhang(sizes: Sequence[int], ranks: int, rank: int) -> int:
    """How many values the parameters that overlap a rank's shard have beyond it; ZeRO shards their concatenation.

    `sizes`: those of one optimizer group's parameters, in order. Shards are equal; the last one is padded.
    """
    shard = -(-sum(sizes) // ranks)
    start, end = rank * shard, min((rank + 1) * shard, sum(sizes))
    overlapping = before = 0
    for size in sizes:
        if before < end and before + size > start:
            overlapping += size
        before += size
    return overlapping - max(0, end - start)


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that one token of one sequence adds to the cache, over all layers; bf16 by default.

    Variants whose keys are their values (skv, el) store them once; an odd num_heads rounds up.
    """
    values = sum(count * variant_of(layer).cached(layer).values for layer, count in layer_kinds(config).items())
    return values * bytes_per_value
