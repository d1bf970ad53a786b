"""YAML file + `--section.field=value` overrides → Config, or one error that lists every fault. Torch-free."""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from configs import launcher
from configs.errors import UserError, shortened
from configs.overrides import Overrides
from configs.schema import SECTIONS, Config, Fault, Section, cross_faults
from configs.schema.base import LONGEST_SHOWN, as_yaml
from configs.words import counted
from configs.yaml_text import NotYamlError, parse

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # by the names that pydantic gives them
CHECKED_CHARACTERS = 2**13  # a tree of fewer has room to grow when it is written out
Check = Callable[[Mapping[str, Any]], Iterable[Fault]]  # of the valid sections and the value of `backend`


class Readable(Protocol):
    """A file: a Path, or what else can be read like one."""

    def read_text(self, encoding: str) -> str: ...


class ConfigError(UserError):
    """Everything wrong with one configuration, as text for the user."""

    def __init__(self, source: str, faults: Sequence[Fault | str], overrides: Overrides | None = None) -> None:
        """`overrides` are named in the faults of fields that they set."""
        self.faults = list(faults)
        count = counted(len(faults), "fault")
        lines = [str(fault) if overrides is None else overrides.named(fault) for fault in faults]
        super().__init__(f"{shortened(source, LONGEST_SHOWN)}: {count}\n" + "\n".join(f"  {line}" for line in lines))


def load_config(
    path: str | Readable, overrides: Sequence[str] = (), checks: Sequence[Check] = (), world_size: int | None = None
) -> Config:
    """Read `path`, apply `overrides` (each "--section.field=value") and validate.

    `checks` add faults that need more than the schema (names in a registry, files on disk); they get those sections that are
    valid by themselves, so that they too are reported together with all others. `world_size` defaults to the
    launcher's environment variable WORLD_SIZE. Raises ConfigError with all faults at once.
    """
    size = launcher.world_size() if world_size is None else world_size
    return config_of(str(path), read_tree(path), overrides, checks, size)


def config_of(source: str, tree: dict[str, Any], overrides: Sequence[str], checks: Sequence[Check], size: int) -> Config:
    """The same of what `read_tree` has read of `source`, for `size` processes; the overrides are written into `tree`."""
    applied = Overrides.apply(tree, overrides)
    faults, config = _validate(tree, checks, size)
    if faults or applied.faults or config is None:
        raise ConfigError(source, [*applied.faults, *faults], applied)
    if len(str(tree)) > CHECKED_CHARACTERS:
        _check_written(source, config)
    return config


def _check_written(source: str, config: Config) -> None:
    """ConfigError if a large configuration could not be read back from the config.yaml of its run."""
    try:
        parse(to_yaml(config))
    except NotYamlError as error:
        fault = f"the run could not be resumed: written out with all overrides and defaults in config.yaml, {error}"
        raise ConfigError(source, [f"{fault}; name fewer sources, sets or ranges of samples"]) from error


def smallest_world(path: str, overrides: Sequence[str] = ()) -> int:
    """The smallest number of processes that the layout of a configuration takes, for commands that run without its layout."""
    tree = read_tree(path)
    Overrides.apply(tree, overrides)
    parallel = tree.get("parallel")
    sizes = [parallel.get(axis, 1) for axis in ("tensor", "pipeline", "replicate")] if isinstance(parallel, dict) else []
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


def to_yaml(config: Section) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    buffer = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(_without_defaults_in_lists(config), buffer)  # of a thousand sources more than half
    return buffer.getvalue()


def _without_defaults_in_lists(section: Section) -> dict[str, Any]:
    tree = section.model_dump()
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            tree[name] = _without_defaults_in_lists(value)
        elif section.element(name) is not None:
            tree[name] = [element.model_dump(exclude_defaults=True) for element in value]
    return tree


def read_tree(path: str | Readable) -> dict[str, Any]:
    """The sections of a YAML file. ConfigError if it holds none."""

    def fail(why: str) -> NoReturn:
        raise ConfigError(str(path), [why])

    try:
        tree = parse((Path(path) if isinstance(path, str) else path).read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        fail("is not UTF-8 text")
    except ValueError as error:  # a zero byte in the path
        fail(f"cannot be read: {error}")
    except NotYamlError as error:
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


def _validate(tree: Mapping[str, Any], checks: Sequence[Check], world_size: int) -> tuple[list[Fault], Config | None]:
    """All faults; the configuration, if it can be made at all."""
    faults: list[Fault] = []
    sections: dict[str, Section] = {}
    for name, kind in SECTIONS.items():
        # A missing section is validated as an empty one, so that its required fields are named.
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
    return faults, config


def _validate_section(kind: type[Section], name: str, given: object) -> tuple[list[Fault], Section | None]:
    """Faults of one section; the section, if its known keys can be used, so that unknown ones hide nothing else."""
    if not isinstance(given, dict):
        return [Fault(name, given, f"must be a mapping with the fields {', '.join(kind.model_fields)}")], None
    known = {str(key): value for key, value in given.items() if str(key) in kind.model_fields}
    faults = [_unknown(kind, str(key), value, name) for key, value in given.items() if str(key) not in known]
    try:
        section = kind(**known)
    except ValidationError as error:
        return [*faults, *(_to_fault(detail, kind, name) for detail in error.errors())], None
    own = (Fault(f"{name}.{fault.key}", fault.value, fault.allowed) for fault in section.faults())
    return [*faults, *own], section


def _unknown(section: type[Section], wanted: str, value: object, prefix: str = "") -> Fault:
    known = list(section.model_fields)
    near = difflib.get_close_matches(wanted[:100], known, n=1)
    if section is Config:  # a field written without its section
        near = near or [f"{name}.{wanted}" for name, kind in SECTIONS.items() if wanted in kind.model_fields]
    hint = f"did you mean {near[0]}? " if near else ""
    return Fault(f"{prefix}.{wanted}" if prefix else wanted, value, f"unknown key; {hint}known here: {', '.join(known)}")


def _to_fault(detail: ErrorDetails, section: type[Section], prefix: str = "") -> Fault:
    key = ".".join(part for part in (prefix, str(detail["loc"][0])) if part)
    inner = section.section(str(detail["loc"][0]))
    if inner is not None:
        if detail["type"] == "model_type":
            return Fault(key, detail["input"], f"must be a mapping with the fields {', '.join(inner.model_fields)}")
        return _to_fault({**detail, "loc": detail["loc"][1:]}, inner, key)
    element = section.element(str(detail["loc"][0]))
    if element is not None and len(detail["loc"]) > 1:
        if detail["type"] == "model_type":
            fields = ", ".join(element.model_fields)
            return Fault(f"{key}[{detail['loc'][1]}]", detail["input"], f"must be a mapping with the fields {fields}")
        return _to_fault({**detail, "loc": detail["loc"][2:]}, element, f"{key}[{detail['loc'][1]}]")
    name = str(detail["loc"][0])
    if name in section.model_fields and get_origin(section.model_fields[name].annotation) is dict and len(detail["loc"]) > 1:
        key = f"{key}.{detail['loc'][1]}"  # of one entry
    if detail["type"] == "extra_forbidden":
        return _unknown(section, str(detail["loc"][0]), detail["input"], prefix)
    if detail["type"] == "missing":
        return Fault(key, None, "required")
    return Fault(key, detail["input"], _allowed(detail))


def _allowed(detail: ErrorDetails) -> str:
    """What a field takes, of a value that it does not take."""
    if detail["type"] == "string_type" and isinstance(detail["input"], int | float):
        return f"must be text: write it in quotes, '{as_yaml(detail['input'])}'"
    for relation, words in BOUNDS.items():
        if relation in detail.get("ctx", {}):
            return f"must be {words} {detail['ctx'][relation]}"
    return (
        detail["msg"]
        .replace("Input should be", "must be")
        .replace("Input", "value")
        .replace("a valid boolean", "true or false")
        .replace("a valid dictionary", "a mapping")
    )
