"""YAML file + `--section.field=value` overrides → Config, or one error that lists every fault. Torch-free."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from configs.errors import UserError
from configs.schema import Config, Fault, Section, cross_faults

SECTIONS: dict[str, type[Section]] = {
    name: info.annotation
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}
Check = Callable[[Mapping[str, Any]], Iterable[Fault]]  # gets the valid sections and the value of `backend`


class ConfigError(UserError):
    """Everything wrong with one configuration, as text for the user."""

    def __init__(self, source: str, faults: Sequence[object]) -> None:
        self.faults = list(faults)
        count = f"{len(faults)} fault" + ("s" if len(faults) != 1 else "")
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  {fault}" for fault in faults))


def load_config(
    path: str | Path, overrides: Sequence[str] = (), checks: Sequence[Check] = (), world_size: int | None = None
) -> Config:
    """Read `path`, apply `overrides` (each "--section.field=value") and validate.

    `checks` find faults that need more than the schema (names in a registry, files on disk). They get the sections that are
    valid by themselves, so that all faults are reported together. `world_size` defaults to the launcher's environment variable
    WORLD_SIZE. Raises ConfigError with all faults at once.
    """
    source = str(path)
    tree = _read_yaml(path)
    faults: list[object] = list(_apply_overrides(tree, overrides))
    return _validate(source, tree, faults, checks, int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size)


def to_yaml(config: Section) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    buffer = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(config.model_dump(), buffer)
    return buffer.getvalue()


def _read_yaml(path: str | Path) -> dict[str, Any]:
    def fail(why: str) -> NoReturn:
        raise ConfigError(str(path), [why])

    try:
        tree = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        fail("is not UTF-8 text")
    except _NotYamlError as error:
        fail(f"is not valid YAML: {error}")
    if not isinstance(tree, dict):
        fail(f"must hold a mapping of sections ({', '.join(Config.model_fields)})")
    return tree


def flat_fields(section: Section, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every field."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class _NotYamlError(Exception):
    """Why a text is not YAML, in one line."""


def _parse(text: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, IndexError, RecursionError) as error:  # impossible dates, odd escapes, deep nesting
        raise _NotYamlError(" ".join(str(error).split()) or type(error).__name__) from error


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        if not override.startswith("--") or not equals or not name:
            yield f"{override}: an override is written --section.field=value"
            continue
        try:
            value = _parse(text) if text else None
        except _NotYamlError as error:
            yield f"{override}: the value is not valid YAML ({error})"
            continue
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            below = node.setdefault(parent, {})
            if not isinstance(below, dict):
                below = node[parent] = {}
            node = below
        node[leaf] = value


def _validate(source: str, tree: dict[str, Any], faults: list[object], checks: Sequence[Check], world_size: int) -> Config:
    sections: dict[str, Section] = {}
    for name, kind in SECTIONS.items():
        # Validate a missing section as an empty one, so that the error names its required fields.
        given = tree.get(name)
        section_faults, section = _validate_section(kind, name, {} if given is None else given)
        faults += section_faults
        if section is not None:
            sections[name] = section
    scalars = {str(key): value for key, value in tree.items() if str(key) not in SECTIONS}
    config = None
    try:
        config = Config(**scalars, **sections)  # type: ignore[arg-type]
    except ValidationError as error:
        faults += [_to_fault(detail, Config) for detail in error.errors() if detail["loc"][0] not in SECTIONS]
    faults += cross_faults(sections, world_size)
    valid = {**sections, "backend": scalars.get("backend", Config.model_fields["backend"].default)}
    for check in checks:
        faults += check(valid)
    if faults or config is None:
        raise ConfigError(source, faults)
    return config


def _validate_section(kind: type[Section], name: str, given: object) -> tuple[list[Fault], Section | None]:
    if not isinstance(given, dict):
        return [Fault(name, given, f"must be a mapping with the fields {', '.join(kind.model_fields)}")], None
    try:
        section = kind(**{str(key): value for key, value in given.items()})
    except ValidationError as error:
        return [_to_fault(detail, kind, name) for detail in error.errors()], None
    return [Fault(f"{name}.{fault.key}", fault.value, fault.allowed) for fault in section.faults()], section


def _to_fault(detail: ErrorDetails, section: type[BaseModel], prefix: str = "") -> Fault:
    key = ".".join(part for part in (prefix, str(detail["loc"][0])) if part)
    if detail["type"] == "extra_forbidden":
        known = list(section.model_fields)
        wanted = str(detail["loc"][0])
        near = difflib.get_close_matches(wanted, known, n=1)
        if section is Config:  # a field written without its section
            near = near or [f"{name}.{wanted}" for name, kind in SECTIONS.items() if wanted in kind.model_fields]
        hint = f"did you mean {near[0]}? " if near else ""
        return Fault(key, detail["input"], f"unknown key; {hint}known here: {', '.join(known)}")
    if detail["type"] == "missing":
        return Fault(key, None, "required")
    return Fault(
        key,
        detail["input"],
        detail["msg"]
        .replace("Input should be", "must be")
        .replace("Input", "value")
        .replace("a valid boolean", "true or false"),
    )
