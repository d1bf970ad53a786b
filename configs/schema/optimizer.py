"""Section `optimizer`: AdamW."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import Section


class OptimizerConfig(Section):
    kind: str = Field("adamw", description="Optimizer; adamw keeps two moments of each value in fp32")
    lr: float = Field(3e-4, ge=1e-12, le=100, description="Peak learning rate")
    head_embedding_lr_scale: float = Field(
        1.0, ge=0, le=1e6, description="Learning rate of head embeddings (mhe_*) as a multiple of that of all else"
    )
    attention_output_lr_scale: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Learning rate of attention's output projections as a multiple of that of all else; many alike heads need "
        "less (docs/study.md)",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment")
    epsilon: float = Field(1e-8, ge=1e-30, le=1, description="Added to the denominator")
    weight_decay: float = Field(0.1, ge=0, le=1e6, description="Decoupled decay; none on norms, biases and head embeddings")
