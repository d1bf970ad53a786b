"""Section `training`: steps, batches and precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from configs.schema.base import Fault, Section


class AverageConfig(Section):
    """An average of the weights beside them (pretrain/loop/averaging.py): none, or one of the two."""

    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Checkpoints hold an exponential moving average of the weights, too: after the n-th step "
        "decay' * average + (1 - decay') * weights, where decay' is min(decay, (n - 1) / (n + 8)); null: none",
    )
    last: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="Checkpoints hold what the average of the weights of so many saves takes: their own, and the last ones at "
        "multiples of checkpoint.every_steps; null: none",
    )


class TrainingConfig(Section):
    steps: int = Field(ge=1, le=10**9, description="Optimizer steps of the run")
    global_batch_size: int = Field(
        ge=1,
        le=2**24,
        description="Samples per optimizer step; each rank accumulates global_batch_size / (micro_batch_size * data-parallel "
        "ranks) micro-batches",
    )
    micro_batch_size: int = Field(ge=1, le=2**24, description="Samples per forward and backward pass on one rank")
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32",
        description="bf16 keeps fp32 master weights; gradients are accumulated and summed over ranks in fp32. fp8 is bf16 with "
        "matrix products in float8, on GPUs that have them, with torchao installed; backend fsdp only",
    )
    gradient_clipping: float = Field(1.0, ge=0, le=1e6, description="Largest global gradient norm; 0: no clipping")
    recompute_activations: bool = Field(False, description="Recompute each block in the backward pass to save memory")
    compile: bool = Field(False, description="torch.compile for each block; backend fsdp only")
    deterministic: bool = Field(True, description="Same seed and layout give bitwise the same losses; somewhat slower on GPUs")
    average: Annotated[AverageConfig, BeforeValidator(lambda given: {} if given is None else given)] = AverageConfig()

    def faults(self) -> Iterator[Fault]:
        if self.average.decay is not None and self.average.last is not None:
            yield Fault("average.last", self.average.last, "one average only: set it or training.average.decay to null")
