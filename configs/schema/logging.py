"""Section `logging`: progress on screen, TensorBoard, MFU."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import Section


class LoggingConfig(Section):
    every_steps: int = Field(10, ge=1, le=10**9, description="Steps between lines of output when it is not a terminal")
    tensorboard: bool = Field(True, description="Write TensorBoard events beside metrics.jsonl")
    heads: bool = Field(
        False,
        description="With each validation, measure how alike the heads of a layer are and how far head embeddings have spread "
        "(docs/gha.md#how-alike-heads-are)",
    )
    peak_tflops: float | None = Field(
        None,
        ge=1e-3,
        le=1e6,
        description="Peak TFLOP/s of one device for MFU; null: looked up for common GPUs, for others no MFU is shown",
    )
