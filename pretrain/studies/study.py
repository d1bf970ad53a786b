"""A study's YAML file: what it varies, and how its children run. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from configs.errors import UserError
from configs.load import ConfigError
from configs.schema import Fault
from configs.yaml_text import NotYamlError, parse
from model.costs.solve import WAYS, By
from pretrain.studies.points import FORMS, Point, is_field, label, points, set_fields

Kept = Literal["none", "last"]
Cost = Literal["parameters", "flops", "kv_bytes", "tokens"]
COSTS: tuple[Cost, ...] = get_args(Cost)
BUDGETS = ("steps", "tokens", "flops", "hours")
KEYS = ("name", "folder", "base", "jobs", "processes", "checkpoints", "set", "budget", "parts")
PART_KEYS = ("set", *FORMS, "match", "budget")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class Match:
    """Children cost what one with `to` in place of their own fields and labels costs."""

    cost: Cost
    to: Mapping[str, object]
    by: By | None = None


@dataclass(frozen=True)
class Budget:
    """How long each child trains."""

    unit: Literal["steps", "tokens", "flops"]
    amount: int


@dataclass(frozen=True)
class Part:
    """Children that are compared with each other."""

    name: str
    fields: Mapping[str, object]
    points: tuple[Point, ...]
    match: Match | None
    budget: Budget | None
    axes: Mapping[str, Any] = field(default_factory=dict)  # labelled sets of fields, by axis and label


@dataclass(frozen=True)
class Study:
    """What a study's file says, with defaults filled in."""

    path: str
    name: str
    folder: Path
    base: str
    jobs: int
    processes: int
    checkpoints: Kept
    hours: float | None
    fields: Mapping[str, object]
    parts: tuple[Part, ...]


def read_study(path: str) -> Study:
    """The study of a file. ConfigError with all of its faults."""
    tree, faults = _tree(path), list[Fault]()
    take = _Taker(tree, faults)
    take.known("", KEYS)
    name = take.name("name")
    folder, base = take.text("folder"), take.text("base")
    jobs, processes = take.whole("jobs", 1, 1024), take.whole("processes", 1, 2**20)
    kept = take.one_of("checkpoints", get_args(Kept), "none")
    fields = set_fields(tree.get("set"), "set", faults)
    budget, hours = _budget(tree.get("budget"), "budget", BUDGETS, faults)
    parts = _parts(tree.get("parts"), fields, budget, faults)
    if faults:
        raise ConfigError(path, faults)
    return Study(path, name, Path(folder).expanduser(), base, jobs, processes, cast(Kept, kept), hours, fields, parts)


def _tree(path: str) -> dict[str, Any]:
    try:
        tree = parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: is not UTF-8 text") from error
    except NotYamlError as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold a mapping of {', '.join(KEYS)}")
    return {str(key): value for key, value in tree.items()}


@dataclass(frozen=True)
class _Taker:
    """Takes values of simple types; what is wrong with them is collected."""

    tree: Mapping[str, Any]
    faults: list[Fault]

    def known(self, prefix: str, keys: tuple[str, ...]) -> None:
        for key in self.tree:
            if key not in keys:
                self.faults.append(Fault(f"{prefix}{key}", self.tree[key], f"unknown key; known here: {', '.join(keys)}"))

    def text(self, key: str) -> str:
        value = self.tree.get(key)
        if not isinstance(value, str) or not value:
            self.faults.append(Fault(key, value, "required: a path"))
            return ""
        return value

    def name(self, key: str) -> str:
        value = self.tree.get(key)
        if not isinstance(value, str) or not NAME.fullmatch(value):
            self.faults.append(Fault(key, value, "required: a name of letters, digits and ._+-"))
            return ""
        return value

    def whole(self, key: str, smallest: int, largest: int) -> int:
        value = self.tree.get(key, smallest)
        if type(value) is not int or not smallest <= value <= largest:
            self.faults.append(Fault(key, value, f"must be a whole number from {smallest} to {largest:,}"))
            return smallest
        return value

    def one_of(self, key: str, words: tuple[str, ...], default: str) -> str:
        value = self.tree.get(key, default)
        if value not in words:
            self.faults.append(Fault(key, value, f"must be {' or '.join(words)}"))
            return default
        return value


def _budget(tree: Any, key: str, units: tuple[str, ...], faults: list[Fault]) -> tuple[Budget | None, float | None]:
    """What each child may take, or the hours that the sweep may."""
    if tree is None:
        return None, None
    unit = next(iter(tree)) if isinstance(tree, dict) and len(tree) == 1 else None
    if unit not in units:
        faults.append(Fault(key, tree, f"must have one of {', '.join(units)}, such as {{steps: 1000}}"))
        return None, None
    amount = tree[unit]
    if type(amount) not in (int, float) or not 0 < amount < 1e30 or (unit == "steps" and int(amount) != amount):
        faults.append(Fault(f"{key}.{unit}", amount, "must be a number above 0"))
        return None, None
    return (None, float(amount)) if unit == "hours" else (Budget(unit, int(amount)), None)


def _parts(tree: Any, common: Mapping[str, object], budget: Budget | None, faults: list[Fault]) -> tuple[Part, ...]:
    if not isinstance(tree, dict) or not tree:
        faults.append(Fault("parts", tree, "required: a mapping of parts, which run in this order"))
        return ()
    found = []
    for name, part in tree.items():
        key = f"parts.{name}"
        if not NAME.fullmatch(str(name)):
            faults.append(Fault("parts", name, "must be a name of letters, digits and ._+-"))
        elif not isinstance(part, dict):
            faults.append(Fault(key, part, f"must be a mapping of {', '.join(PART_KEYS)}"))
        else:
            found.append(_part(str(name), part, key, common, budget, faults))
    return tuple(found)


def _part(
    name: str, tree: Mapping[str, Any], key: str, common: Mapping[str, object], budget: Budget | None, faults: list[Fault]
) -> Part:
    _Taker(tree, faults).known(f"{key}.", PART_KEYS)
    own, _ = _budget(tree.get("budget"), f"{key}.budget", BUDGETS[:-1], faults)
    budget = own or budget
    fields = set_fields(tree.get("set"), f"{key}.set", faults)
    found = points(tree, key, faults)
    of_points = {field: value for point in found for field, value in point.fields.items()}
    for where, chosen in (("set", common), (f"{key}.set", fields), (key, of_points)):
        if budget is not None and "training.steps" in chosen:
            faults.append(Fault(f"{where}.training.steps", chosen["training.steps"], "the budget decides it; leave one out"))
    grid = tree.get("grid")
    axes = {str(axis): values for axis, values in grid.items() if isinstance(values, dict)} if isinstance(grid, dict) else {}
    return Part(name, fields, tuple(found), _match(tree.get("match"), f"{key}.match", axes, faults), budget, axes)


def _match(tree: Any, key: str, axes: Mapping[str, Any], faults: list[Fault]) -> Match | None:
    if tree is None:
        return None
    if not isinstance(tree, dict):
        faults.append(Fault(key, tree, "must be a mapping, such as {cost: parameters, to: {model.attention: mha}}"))
        return None
    take = _Taker(tree, faults)
    take.known(f"{key}.", ("cost", "to", "by"))
    cost, by, to = tree.get("cost"), tree.get("by"), tree.get("to")
    if cost not in COSTS:
        faults.append(Fault(f"{key}.cost", cost, f"must be one of {', '.join(COSTS)}"))
    if by is not None and (by not in WAYS or cost == "tokens"):
        wanted = "tokens are matched by training.steps" if cost == "tokens" else f"must be one of {', '.join(WAYS)}"
        faults.append(Fault(f"{key}.by", by, wanted))
    if not isinstance(to, dict) or not to:
        faults.append(Fault(f"{key}.to", to, "required: fields of the child to match, such as {model.attention: mha}"))
        return None
    set_fields({name: value for name, value in to.items() if is_field(str(name))}, f"{key}.to", faults)
    for name, text in to.items():
        if not is_field(str(name)) and label(text) not in map(label, axes.get(str(name), ())):
            faults.append(Fault(f"{key}.to.{name}", text, "must be a field, or an axis of the grid with one of its labels"))
    return Match(cast(Cost, cost), {str(name): value for name, value in to.items()}, cast("By | None", by))
