"""The points of a study's part: which fields each child sets, and under which labels. Torch-free.

A part has points by `grid`, `list` or `random`; with two of them it has their product.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.schema import SECTIONS, Config, Fault
from configs.schema.base import as_yaml

FORMS = ("grid", "list", "random")
DRAWS = ("uniform", "log_uniform", "choice")
DIGITS = 4  # of a number drawn from a range
MOST = 100_000  # points of a part


@dataclass(frozen=True)
class Point:
    """Labels by axis, and the values of dotted fields; `named` are the labels that an id is made of."""

    labels: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, object] = field(default_factory=dict)
    named: tuple[str, ...] = ()

    def __add__(self, other: Point) -> Point:
        return Point({**self.labels, **other.labels}, {**self.fields, **other.fields}, (*self.named, *other.named))


def is_field(name: str) -> bool:
    """Whether a name is that of a field, section.field or backend; others are names that the study chooses."""
    return "." in name or (name in Config.model_fields and name not in SECTIONS)


def label(value: object) -> str:
    """A field's value as a label."""
    return value if isinstance(value, str) else as_yaml(value)


def points(part: Mapping[str, Any], key: str, faults: list[Fault]) -> list[Point]:
    """All points of a part, in order: the last axis changes fastest."""
    forms = [form for form in ("list", "random", "grid") if form in part]
    if not forms:
        faults.append(Fault(key, sorted(part), f"needs {', '.join(FORMS[:-1])} or {FORMS[-1]}"))
    readers = {"grid": _grid, "list": _list, "random": _random}
    before = len(faults)
    sides = [readers[form](part[form], f"{key}.{form}", faults) for form in forms]
    if math.prod(map(len, sides)) > MOST:
        faults.append(Fault(key, math.prod(map(len, sides)), f"has more than {MOST:,} children"))
    for one, other in itertools.combinations(sides, 2):
        for name in sorted(_names(one) & _names(other)):
            faults.append(Fault(key, name, "is set twice: by two of grid, list and random"))
    if not forms or len(faults) > before:
        return []
    return [sum(chosen, Point()) for chosen in itertools.product(*sides)]


def _names(side: Sequence[Point]) -> set[str]:
    return {name for point in side for name in (*point.labels, *point.fields)}


def set_fields(tree: Any, key: str, faults: list[Fault]) -> dict[str, object]:
    """A mapping of dotted fields to values."""
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        faults.append(Fault(key, tree, "must be a mapping of fields, such as {optimizer.lr: 1e-3}"))
        return {}
    for name in tree:
        if not isinstance(name, str) or not is_field(name):
            faults.append(Fault(key, name, "is no field; write section.field, such as optimizer.lr"))
        elif name == "run.folder":
            faults.append(Fault(f"{key}.{name}", tree[name], "the sweep chooses it: <folder>/<part>/<child>"))
    return {str(name): value for name, value in tree.items()}


def _grid(tree: Any, key: str, faults: list[Fault]) -> list[Point]:
    if not isinstance(tree, dict) or not tree:
        faults.append(Fault(key, tree, "must be a mapping of axes"))
        return []
    axes = [_axis(str(name), values, f"{key}.{name}", faults) for name, values in tree.items()]
    _check_disjoint(axes, key, faults)
    if math.prod(map(len, axes)) > MOST:
        faults.append(Fault(key, math.prod(map(len, axes)), f"has more than {MOST:,} children"))
        return []
    return [sum(chosen, Point()) for chosen in itertools.product(*axes)]


def _axis(name: str, values: Any, key: str, faults: list[Fault]) -> list[Point]:
    """A dotted field with a list of values, or a plain name with labelled sets of fields."""
    if is_field(name):
        if name == "run.folder":
            set_fields({name: values}, key.rpartition(f".{name}")[0], faults)
        if not isinstance(values, list) or not values:
            faults.append(Fault(key, values, "must be a list of values"))
            return []
        labels = [label(value) for value in values]
        found = [Point({name: text}, {name: value}, (text,)) for text, value in zip(labels, values, strict=True)]
    else:
        if not isinstance(values, dict) or not values:
            wanted = "is no section.field, so it must have labelled sets of fields, such as {mha: {model.attention: mha}}"
            faults.append(Fault(key, values, wanted))
            return []
        labels = [label(text) for text in values]
        sets = [set_fields(fields, f"{key}.{text}", faults) for text, fields in values.items()]
        found = [Point({name: text}, fields, (text,)) for text, fields in zip(labels, sets, strict=True)]
    for text, count in Counter(labels).items():
        if count > 1:
            faults.append(Fault(key, text, f"is there {count} times"))
    return found


def _check_disjoint(axes: Sequence[Sequence[Point]], key: str, faults: list[Fault]) -> None:
    owners = Counter(name for axis in axes for name in {name for point in axis for name in point.fields})
    for name, count in owners.items():
        if count > 1:
            faults.append(Fault(key, name, f"is set by {count} axes; leave it to one"))


def _list(tree: Any, key: str, faults: list[Fault]) -> list[Point]:
    """Entries of fields; plain names, such as `label`, are labels of the child."""
    if not isinstance(tree, list) or not tree:
        faults.append(Fault(key, tree, "must be a list of mappings of fields, such as [{label: small, model.num_layers: 2}]"))
        return []
    found = []
    for number, entry in enumerate(tree):
        if not isinstance(entry, dict):
            faults.append(Fault(f"{key}[{number}]", entry, "must be a mapping of fields"))
            continue
        plain = {str(name): label(value) for name, value in entry.items() if not is_field(str(name))}
        fields = set_fields({name: value for name, value in entry.items() if is_field(str(name))}, f"{key}[{number}]", faults)
        texts = {name: label(value) for name, value in fields.items()}
        found.append(Point({**plain, **texts}, fields, tuple((plain or texts).values())))
    for names, count in Counter(point.named for point in found).items():
        if count > 1:
            faults.append(Fault(key, ",".join(names), f"names {count} entries; give each a label of its own"))
    return found


def _random(tree: Any, key: str, faults: list[Fault]) -> list[Point]:
    """Points drawn from ranges and choices: the same for the same seed, however many samples and axes there are."""
    axes = {str(name): spec for name, spec in tree.items() if name not in ("samples", "seed")} if isinstance(tree, dict) else {}
    if not axes:
        faults.append(Fault(key, tree, "must be a mapping of axes, with samples and, if wanted, seed"))
        return []
    samples, seed = tree.get("samples"), tree.get("seed", 0)
    if type(samples) is not int or not 1 <= samples <= MOST:
        faults.append(Fault(f"{key}.samples", samples, f"must be a whole number from 1 to {MOST:,}"))
    if type(seed) is not int:
        faults.append(Fault(f"{key}.seed", seed, "must be a whole number"))
    found = {name: _choices(name, spec, f"{key}.{name}", faults) for name, spec in axes.items()}
    if any(choices is None for choices in found.values()) or type(samples) is not int or type(seed) is not int:
        return []
    _check_disjoint([choices for choices in found.values() if isinstance(choices, list)], key, faults)
    return [
        sum((_drawn(name, choices, f"{seed}/{number}/{name}") for name, choices in found.items()), _sample(number))
        for number in range(samples)
    ]


@dataclass(frozen=True)
class _Range:
    low: float
    high: float
    logarithmic: bool

    def draw(self, draws: random.Random) -> float:
        if self.logarithmic:
            value = math.exp(draws.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = draws.uniform(self.low, self.high)
        if type(self.low) is int and type(self.high) is int:
            return min(max(round(value), self.low), self.high)
        return float(f"{value:.{DIGITS}g}")


def _choices(name: str, spec: Any, key: str, faults: list[Fault]) -> list[Point] | _Range | None:
    """What an axis is drawn from; None if it is at fault."""
    how = next(iter(spec)) if isinstance(spec, dict) and len(spec) == 1 else None
    if how not in DRAWS or (how != "choice" and not is_field(name)):
        wanted = "{choice: …}, or for a field {uniform: [from, to]} or {log_uniform: [from, to]}"
        faults.append(Fault(key, spec, f"must be {wanted}"))
        return None
    if how == "choice":
        return _axis(name, spec[how], f"{key}.choice", faults) or None
    bounds = spec[how]
    numbers = isinstance(bounds, list) and len(bounds) == 2 and all(type(one) in (int, float) for one in bounds)
    if not numbers or not bounds[0] < bounds[1] or (how == "log_uniform" and bounds[0] <= 0):
        faults.append(
            Fault(f"{key}.{how}", bounds, "must be two numbers, [from, to]" + (" above 0" if how == "log_uniform" else ""))
        )
        return None
    return _Range(bounds[0], bounds[1], how == "log_uniform")


def _sample(number: int) -> Point:
    return Point({"sample": str(number)}, {}, (str(number),))


def _drawn(name: str, choices: list[Point] | _Range | None, seed: str) -> Point:
    draws = random.Random(seed)
    if isinstance(choices, list):
        return choices[draws.randrange(len(choices))]
    assert choices is not None
    value = choices.draw(draws)
    return Point({name: label(value)}, {name: value}, (label(value),))


def as_override(name: str, value: object) -> str:
    """A field's value as the command line takes it: text as it is, all else as JSON, which YAML reads the same."""
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
