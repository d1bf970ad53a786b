"""Section `validation`: when, and on what, a model is measured while it is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from configs.schema.base import Fault, Section, name_keys, path_text
from configs.schema.data import NAME

LONGEST_NAME = 60  # characters; it becomes a part of the names of figures


def _paths(paths: dict[str, str]) -> dict[str, str]:
    if any(path == "" for path in paths.values()):
        raise PydanticCustomError("path", "must not have empty paths")
    return {name: path_text(path) for name, path in paths.items()}


NamedPaths = Annotated[dict[str, str], BeforeValidator(name_keys), AfterValidator(_paths)]


class ValidationConfig(Section):
    every_steps: int = Field(100, ge=0, le=10**9, description="Steps between validations; 0: only after the last step")
    samples: int | None = Field(None, ge=1, le=10**9, description="Samples per validation, of each set; null: the full split")
    sets: NamedPaths = Field(
        {},
        description="Validation sets as {name: folder}, each with figures of its own: folders of launch/prepare.py with the "
        "run's tokenizer and a split `valid`. {}: that split of data.path, or of each source that has one; of a stream none",
    )
    tasks: NamedPaths = Field(
        {},
        description="Multiple-choice tasks as {name: file}, scored by log-probability: .jsonl with `context`, `choices` and "
        "`answer`, the right one's index from 0, in each line",
    )
    tasks_every_steps: int | None = Field(
        None, ge=0, le=10**9, description="Steps between scores of tasks; 0: only after the last step; null: as every_steps"
    )

    def faults(self) -> Iterator[Fault]:
        for key in ("sets", "tasks"):
            paths: Mapping[str, str] = getattr(self, key)
            for name in paths:
                if not re.fullmatch(NAME, name) or len(name) > LONGEST_NAME:
                    allowed = (
                        f"a name has 1 to {LONGEST_NAME} letters, digits, `_`, `.` and `-`, and begins with a letter or a digit"
                    )
                    yield Fault(f"{key}.{name}", paths[name], allowed)
        if self.tasks_every_steps is not None and not self.tasks:
            yield Fault("tasks_every_steps", self.tasks_every_steps, "needs validation.tasks; or must be null")
