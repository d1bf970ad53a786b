"""Bytes of training state that one rank keeps, and of the cache of generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from configs.schema import ModelConfig
from model.attention.registry import attention_variant

Sharding = Literal["zero0", "zero1", "zero2", "zero3", "fsdp"]

ZERO3_WHOLE = 100_000  # DeepSpeed's stage3_param_persistence_threshold: parameters of so many values or fewer stay whole


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


def kv_cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that one token of one sequence adds to the cache over all layers; bf16 unless said otherwise.

    What is key and value at once (skv, el) is kept once; an odd num_heads rounds up.
    """
    return 2 * attention_variant(config.attention).kv_heads(config) * config.head_width * config.num_layers * bytes_per_value
