"""Section `schedule`: the learning rate over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from configs.schema.base import Fault, Section


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd"] = Field(
        "cosine", description="cosine: decay from warmup on; wsd: warmup, stable, linear decay"
    )
    warmup_steps: int = Field(0, ge=0, le=10**9, description="Steps of linear warmup to the peak; fewer than training.steps")
    decay_steps: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="Length of wsd's final decay; null: a tenth of training.steps, at most the steps after warmup; wsd only",
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate as a fraction of the peak")

    def faults(self) -> Iterator[Fault]:
        if self.decay_steps is not None and self.kind != "wsd":
            yield Fault("decay_steps", self.decay_steps, "only kind wsd has it; set it to null")
