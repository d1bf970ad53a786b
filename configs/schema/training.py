"""Section `training`: steps, batches and precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import Section


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
