"""`--section.field=value`: overrides of a configuration from the command line. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from configs.errors import shortened
from configs.schema import Config, Fault, Section
from configs.schema.base import LONGEST_SHOWN
from configs.yaml_text import NotYamlError, parse


@dataclass
class Overrides:
    """What was written on the command line, by the dotted names of fields; later ones win."""

    texts: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @classmethod
    def apply(cls, tree: dict[str, Any], overrides: Sequence[str]) -> Overrides:
        """Write each override into the sections of `tree`; `faults` are those that are no overrides at all.

        Fields of type text take theirs as typed, all others as YAML.
        """
        made = cls()
        for override in overrides:
            name, equals, text = override.removeprefix("--").partition("=")
            if not override.startswith("--") or not equals or not name:
                made.faults.append(f"{_shown(override)}: an override is written --section.field=value")
                continue
            try:
                value = _value(name, text)
            except NotYamlError as error:
                made.faults.append(f"{_shown(override)}: the value is not valid YAML: {error}")
                continue
            made.texts[name] = text
            sections, key = _place(name)
            place = tree
            for section in sections:
                if not isinstance(place.get(section), dict):
                    place[section] = {}
                place = place[section]
            place[key] = value
        return made

    def named(self, fault: Fault | str) -> str:
        """A fault as text; that of an overridden field names the override, since the file does not hold the value."""
        if isinstance(fault, str) or fault.key not in self.texts:
            return str(fault)
        return f"{_shown(f'--{fault.key}={self.texts[fault.key]}')}: {fault.allowed}"


def _shown(override: str) -> str:
    return shortened(override, LONGEST_SHOWN)


def _value(name: str, text: str) -> Any:
    """What an override sets the field of this name to."""
    sections, key = _place(name)
    holder: type[Section] | None = Config
    for section in sections:
        holder = holder.section(section) if holder is not None else None
    info = holder.model_fields.get(key) if holder is not None else None
    kind = info.annotation if info is not None else None
    if _holds_text(kind) and not (text == "null" and NoneType in get_args(kind)):
        return text
    return parse(text) if text else None


def _place(name: str) -> tuple[list[str], str]:
    """The sections that a dotted name passes through, and the key in the last of them. The first may be unknown."""
    first, dot, key = name.partition(".")
    if not dot:
        return [], first
    sections, holder = [first], Config.section(first)
    while holder is not None and "." in key and (holder := holder.section(key.partition(".")[0])) is not None:
        section, _, key = key.partition(".")
        sections.append(section)
    return sections, key


def _holds_text(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _holds_text(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return all(isinstance(word, str) for word in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return all(_holds_text(kind) for kind in get_args(annotation) if kind is not NoneType)
    return annotation is str
