"""The base of every section, and the fault it reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a configuration: the field's dotted name, its value and what is allowed."""

    key: str
    value: Any
    allowed: str

    def __str__(self) -> str:
        return f"{self.key} = {as_yaml(self.value)}: {self.allowed}"


def as_yaml(value: object) -> str:
    """A field's value as written in a configuration file."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


class Section(BaseModel):
    """One part of a configuration: frozen and strictly typed; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def faults(self) -> Iterator[Fault]:
        """Faults that the types cannot express; keys are relative to the section."""
        yield from ()
