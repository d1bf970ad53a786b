"""Section `logging`: progress on screen, TensorBoard, MFU."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import Section


class LoggingConfig(Section):
    every_steps: int = Field(10, ge=1, le=10**9, description="Steps between lines on screen when it is no terminal")
    tensorboard: bool = Field(True, description="Write TensorBoard events beside metrics.jsonl")
    peak_tflops: float | None = Field(
        None,
        ge=1e-3,
        le=1e6,
        description="Peak TFLOP/s of one device for MFU; null: known for common GPUs, else no MFU is shown",
    )
