"""Section `run`: where a run writes and what seeds it."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import PathText, Section


class RunConfig(Section):
    folder: PathText = Field(
        min_length=1, description="Where the run writes checkpoints, metrics, TensorBoard logs and its config"
    )
    seed: int = Field(1234, ge=0, lt=2**31, description="Seed of initial weights, data order and dropout")
