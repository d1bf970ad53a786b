"""The schema as text for people: `--help` and docs/configuration.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from configs.schema import Config, Section

REFERENCE_INTRODUCTION = """# Configuration reference

A run is one YAML file (YAML 1.2: `1e-3` is a number, `on` is text, a duplicate key is an error). Every field can be overridden
on the command line by its dotted name, `--model.num_heads=96`. Unknown keys, wrong types and impossible combinations are all
reported at once, before anything starts. The resolved file, with every dependent default replaced by its value, is written to
`<run.folder>/config.yaml` and into every checkpoint. `launch/pretrain.py --help` prints the same."""


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, description) of every field, in the schema's order."""
    for name, info in section.model_fields.items():
        inner = section.section(name)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")
        elif (element := section.element(name)) is not None:
            yield f"{prefix}{name}", "list", _default_name(info), info.description or ""
            yield from fields(element, f"{prefix}{name}[].")
        else:
            yield f"{prefix}{name}", _type_name(info.annotation), _default_name(info), info.description or ""


def help_text() -> str:
    """All fields as text for `--help`, at most 100 columns wide."""
    lines = ["configuration fields, each overridable as --NAME=VALUE:"]
    for name, type_name, default, description in fields():
        shown = name if "[]" in name else f"--{name}"  # a list is overridden as a whole
        lines += textwrap.wrap(f"{shown}  ({type_name}; {default})", 98, initial_indent="  ", subsequent_indent=" " * 10)
        lines += textwrap.wrap(description, 98, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def reference_page() -> str:
    """docs/configuration.md: `python -m configs.document > docs/configuration.md` regenerates it."""
    lines = [REFERENCE_INTRODUCTION]
    section = None
    for name, type_name, default, description in fields():
        heading = name.partition(".")[0] if "." in name else "Top level"
        if heading != section:
            section = heading
            lines += [f"\n## {heading}\n", "| field | type | default | meaning |", "|---|---|---|---|"]
        cells = [f"`{name}`", type_name, default.removeprefix("default "), description]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_type_name, get_args(annotation)))
    if annotation is NoneType:
        return "null"
    if get_origin(annotation) is Literal:
        return " or ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {_type_name(get_args(annotation)[0])}"
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("None", "null")


def _default_name(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.default
    if default is None or isinstance(default, bool):
        return "default " + {None: "null", True: "true", False: "false"}[default]
    return f"default {default}"


if __name__ == "__main__":
    print(reference_page(), end="")
