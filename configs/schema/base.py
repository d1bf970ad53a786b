"""The base of every section, and the fault it reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from configs.errors import shortened

LONGEST_NAME = 255  # bytes of a name in a path, on all common file systems
LONGEST_SHOWN = 120  # characters of a key or a value in a message


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a configuration: the field's dotted name, its value and what is allowed."""

    key: str
    value: Any
    allowed: str

    def __str__(self) -> str:
        return f"{shortened(self.key, LONGEST_SHOWN)} = {shortened(as_yaml(self.value), LONGEST_SHOWN)}: {self.allowed}"


def as_yaml(value: object) -> str:
    """A field's value as written in a configuration file."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return repr(list(value) if isinstance(value, tuple) else value)


def path_text(text: str) -> str:
    """A path with `~` replaced by the home folder; a pydantic error for one that no file system has."""
    if "\0" in text:
        raise PydanticCustomError("path", "must not hold a zero byte")
    if max(len(os.fsencode(name)) for name in text.split("/")) > LONGEST_NAME:
        raise PydanticCustomError("path", "must not have names of more than 255 bytes")
    return os.path.expanduser(text)


def name_text(value: Any) -> Any:
    """The text of a name that YAML reads as a number, such as that of the folder 2024."""
    return str(value) if type(value) is int else value


def name_keys(value: Any) -> Any:
    """A mapping whose keys are names."""
    return {name_text(key): entry for key, entry in value.items()} if isinstance(value, dict) else value


PathText = Annotated[str, AfterValidator(path_text)]  # `~` is the home folder
NameText = Annotated[str, BeforeValidator(name_text)]


class Section(BaseModel):
    """One part of a configuration: frozen and strictly typed; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def default(cls, field: str) -> str:
        """A field's default, as written in a configuration file."""
        return as_yaml(cls.model_fields[field].default)

    def changed(self, field: str) -> bool:
        """Whether a field is not at its default."""
        return bool(getattr(self, field) != type(self).model_fields[field].default)

    @classmethod
    def section(cls, field: str) -> type[Section] | None:
        """The section that a field holds; None for other fields and unknown ones."""
        annotation = cls.model_fields[field].annotation if field in cls.model_fields else None
        return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None

    @classmethod
    def element(cls, field: str) -> type[Section] | None:
        """The section that each element of a field is, if that is a list of sections."""
        inner = get_args(cls.model_fields[field].annotation) if field in cls.model_fields else ()
        return inner[0] if inner and isinstance(inner[0], type) and issubclass(inner[0], Section) else None

    def faults(self) -> Iterator[Fault]:
        """Faults that the types cannot express; keys are relative to the section."""
        yield from ()
