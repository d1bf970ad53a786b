"""Section `checkpoint`: when checkpoints are written and which are kept."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import Section


class CheckpointConfig(Section):
    every_steps: int = Field(100, ge=0, le=10**9, description="Steps between checkpoints; 0: only after the last step")
    keep_last: int = Field(2, ge=1, le=10**9, description="How many of the newest checkpoints are kept")
    keep_every: int | None = Field(
        None, ge=1, le=10**9, description="Checkpoints whose step is a multiple of this are never deleted; null: none"
    )
    asynchronous: bool | None = Field(
        None,
        description="Training waits only for a copy of the state in host memory, and goes on while that is written; "
        "null: yes, except with parallel.cpu_offload, where host memory holds the state already",
    )
