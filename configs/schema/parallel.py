"""Section `parallel`: how processes share the model, its state and the batch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import Section


class ParallelConfig(Section):
    zero_stage: int = Field(
        1,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO: 0 replicates (fp32 only), 1 shards optimizer state, 2 gradients too, 3 parameters too; "
        "backend deepspeed only",
    )
    replicate: int = Field(
        1,
        ge=1,
        le=2**16,
        description="Hybrid sharding: so many replicas of the model, each sharded over data-parallel ranks / replicate "
        "neighbours; backend fsdp only",
    )
    cpu_offload: bool = Field(
        False,
        description="Keep in CPU memory: the optimizer's state and step (deepspeed, zero_stage 1 to 3), parameters and "
        "gradients too (fsdp)",
    )
    tensor: int = Field(
        1,
        ge=1,
        le=2**10,
        description="Tensor parallelism: this many neighbouring processes share one model, each with its part of heads, MLP "
        "channels and vocabulary (docs/tensor_parallel.md)",
    )
    sequence: bool = Field(
        False,
        description="Sequence parallelism: norms, dropout and residuals of each tensor-parallel rank see a part of the "
        "sequence; no effect at tensor 1",
    )
    mhe_gather: Literal["auto", "activations", "weights"] = Field(
        "auto",
        description="sha, mhe_*: what ranks gather to have the shared projection's outputs whole, its activations or its "
        "weights; auto: what moves fewer bytes (docs/communication.md)",
    )
    pipeline: int = Field(
        1,
        ge=1,
        le=2**10,
        description="Pipeline parallelism: so many stages, each with some of the layers; backend deepspeed, zero_stage 0 or 1",
    )
    pipeline_balance: Literal["parameters", "time"] = Field(
        "parameters",
        description="What stages have equal shares of: parameters, or measured time of forward and backward, which differs by "
        "run; a run that resumes with as many stages keeps them",
    )
    timeout_minutes: float = Field(
        30,
        ge=1e-3,
        le=10_000,
        description="A run in which nothing has moved for so long ends with a report of where each rank is",
    )
    lost_after_seconds: float = Field(
        30, ge=1, le=3600, description="A process that has given no sign of life for so long is lost, and the run ends"
    )
