"""Section `validation`: when and on how much held-out text the loss is measured."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import Section


class ValidationConfig(Section):
    every_steps: int = Field(100, ge=0, le=10**9, description="Steps between validations; 0: only after the last step")
    samples: int | None = Field(None, ge=1, le=10**9, description="Samples per validation; null: the full split")
