"""From a study to its children: the configuration and command of each, with the faults of all found at once. Torch-free."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import Check, ConfigError, config_of, read_tree
from configs.schema import Config, ModelConfig, RunConfig
from model.costs.flops import flops_per_token
from model.costs.parameters import parameters
from model.costs.solve import match
from model.faults import model_faults
from pretrain.matching import fits, vocabulary_of
from pretrain.studies.points import Point, as_override, label
from pretrain.studies.study import Budget, Match, Part, Study

LONGEST_ID = 100  # characters
SAFE, UNSAFE = re.compile(r"[A-Za-z0-9._+=-]+"), re.compile(r"[^A-Za-z0-9._+=-]+")
MOST_STEPS = 10**9  # as training.steps allows
SHOWN_FAULTS = 40  # lines


@dataclass(frozen=True)
class Child:
    """One run of a study."""

    study: Study
    number: int  # from 1, over all parts
    part: str
    id: str
    axes: Mapping[str, str]
    fields: Mapping[str, object]  # all that differ from the base, but those that the match changed
    match: Match | None
    changed: Mapping[str, object]
    config: Config  # resolved
    base: str  # hash of the base configuration's fields
    flops: int  # of all its tokens

    @property
    def name(self) -> str:
        return f"{self.part}/{self.id}"

    @property
    def folder(self) -> Path:
        return self.study.folder / self.part / self.id

    @property
    def steps(self) -> int:
        return self.config.training.steps

    @property
    def tokens(self) -> int:
        return self.steps * _tokens_per_step(self.config)

    @cached_property
    def parameters(self) -> int:
        return sum(parameters(self.config.model).values())

    @property
    def definition(self) -> dict[str, Any]:
        """Content of child.json."""
        wanted = self.match and {"cost": self.match.cost, "to": dict(self.match.to), "by": self.match.by}
        definition = {
            "study": self.study.name,
            "part": self.part,
            "axes": dict(self.axes),
            "set": dict(self.fields),
            "match": wanted,
            "changed": dict(self.changed),
            "processes": self.study.processes,
            "base": {"path": self.study.base, "sha256": self.base},
        }
        return json.loads(json.dumps(definition, default=str))  # as it is read back

    @property
    def arguments(self) -> list[str]:
        """What follows `launch/pretrain.py`."""
        overrides = [as_override(name, value) for name, value in {**self.fields, **self.changed}.items()]
        return ["--config", self.study.base, *overrides, f"--run.folder={self.folder}", "--resume=auto"]


@dataclass
class Checker:
    """Makes children of a study. What many have in common is read and solved once.

    `rules` are checks that read no data; `data_checks` read data, of which only the sections `_of_data` matter.
    """

    study: Study
    rules: Sequence[Check]
    data_checks: Sequence[Check]
    tree: dict[str, Any] = field(init=False)
    digest: str = field(init=False)
    known: dict[object, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tree = read_tree(self.study.base)
        self.digest = hashlib.sha256(json.dumps(self.tree, sort_keys=True, default=str).encode()).hexdigest()

    def children(self) -> list[Child]:
        """All children of all parts, in order. UserError that names each that is at fault."""
        found, wrong, number = list[Child](), dict[str, list[str]](), 0
        for part in self.study.parts:
            names = set[str]()
            for point in part.points:
                name = child_id(point.named)
                if name in names:
                    wrong.setdefault("two children have one id: change a label", []).append(f"{part.name}/{name}")
                names.add(name)
                number += 1
                try:
                    found.append(self.child(part, point, name, number))
                except ConfigError as error:
                    for fault in str(error).splitlines()[1:]:
                        wrong.setdefault(fault.strip(), []).append(f"{part.name}/{name}")
                except UserError as error:
                    wrong.setdefault(str(error), []).append(f"{part.name}/{name}")
        if wrong:
            raise _faults_of(self.study, wrong, len(found))
        return found

    def child(self, part: Part, point: Point, name: str, number: int) -> Child:
        """One child. UserError if it cannot run."""
        fields = {**self.study.fields, **part.fields, **point.fields}
        if part.budget is not None and part.budget.unit == "steps":
            fields["training.steps"] = part.budget.amount
        checks = [*self.rules, *map(self.remembered, self.data_checks)]
        try:
            changed = self.matched(part, point, fields) if part.match is not None else {}
            if part.budget is not None and part.budget.unit != "steps":
                fields["training.steps"] = self.steps(part.budget, {**fields, **changed})
        except UserError:
            self.load(fields, checks)  # whose own faults come first
            raise
        config = self.load({**fields, **changed}, checks)
        config = config.resolved(self.vocabulary(config))
        flops = _flops_per_step(config) * config.training.steps
        return Child(self.study, number, part.name, name, point.labels, fields, part.match, changed, config, self.digest, flops)

    def load(self, fields: Mapping[str, object], checks: Sequence[Check] = ()) -> Config:
        overrides = [as_override(name, value) for name, value in fields.items()]
        return config_of(self.study.base, copy.deepcopy(self.tree), overrides, checks, self.study.processes)

    def remembered(self, check: Check) -> Check:
        """The same check, whose answer is taken again where nothing that it reads differs."""

        def checked(sections: Mapping[str, Any]) -> list[Any]:
            key = (check, _of_data(sections))
            if key not in self.known:
                self.known[key] = list(check(sections))
            return self.known[key]

        return checked

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def vocabulary(self, config: Config) -> int:
        model = config.model
        key = ("vocabulary", config.data.model_dump_json(), model.vocab_size, model.vocab_multiple)
        return self.once(key, lambda: vocabulary_of(config))

    def steps(self, budget: Budget, fields: Mapping[str, object]) -> int:
        """The steps that take at least the budget's tokens or FLOPs."""
        config = self.load({**fields, "training.steps": MOST_STEPS})
        config = config.resolved(self.vocabulary(config))
        of_step = _tokens_per_step(config) if budget.unit == "tokens" else _flops_per_step(config)
        return max(1, math.ceil(budget.amount / of_step))

    def matched(self, part: Part, point: Point, fields: Mapping[str, object]) -> dict[str, object]:
        """The fields that the match changes."""
        wanted = part.match
        assert wanted is not None
        config = self.load({**fields, "training.steps": MOST_STEPS} if part.budget is not None else fields)
        other = self.reference(part, point, fields)
        if wanted.cost == "tokens":
            return self.same_tokens(config, other, part)
        assert wanted.cost != "tokens"
        vocabulary = self.vocabulary(config)
        model, target = (one.resolved(vocabulary).model for one in (config, other))
        key = (wanted.cost, wanted.by, config.row_length, model, target, config.parallel, config.gha, config.backend)
        cost, by, rules = wanted.cost, wanted.by, fits(config, self.rules, self.study.processes)
        try:
            found = self.once(str(key), lambda: match(model, target, cost, config.row_length, by, rules))
        except UserError as error:
            raise UserError(f"match {cost}: {str(error).replace('--match-by ', 'by: ')}") from error
        return {f"model.{name}": value for name, value in found.changes.items()}

    def same_tokens(self, config: Config, other: Config, part: Part) -> dict[str, object]:
        if part.budget is not None:
            raise UserError("match tokens: the budget decides the steps of every child; leave one out")
        tokens, of_step = other.training.steps * _tokens_per_step(other), _tokens_per_step(config)
        steps = max(1, round(tokens / of_step))
        return {} if steps == config.training.steps else {"training.steps": steps}

    def reference(self, part: Part, point: Point, fields: Mapping[str, object]) -> Config:
        """The child with the match's `to`; options of the child's own variant, which another does not read, are left out."""
        assert part.match is not None
        given = dict(fields)
        chosen: dict[str, object] = {}
        for name, value in part.match.to.items():
            sets = part.axes.get(name)
            if sets is None:
                chosen[name] = value
                continue
            by_label = {label(text): entries or {} for text, entries in sets.items()}
            for own in by_label[point.labels[name]]:
                given.pop(own, None)
            chosen |= by_label[label(value)]
        if part.budget is not None:
            given["training.steps"] = MOST_STEPS
        while True:
            config = self.load({**given, **chosen})
            unread = [f"model.{fault.key.removeprefix('model.')}" for fault in model_faults(_sections(config))]
            spare = [name for name in unread if name in given and name not in chosen]
            if not spare:
                break
            for name in spare:
                del given[name]
        return self.load({**given, **chosen}, [model_faults])


def counted_children(count: int) -> str:
    return f"{count:,} {'child' if count == 1 else 'children'}"


def child_id(labels: Sequence[str]) -> str:
    """A readable name of a folder: the labels; with a hash of them if they are too long or hold other characters."""
    raw = ",".join(labels)
    safe = ",".join(text if SAFE.fullmatch(text) else UNSAFE.sub("-", text).strip("-") for text in labels)
    if safe == raw and len(safe) <= LONGEST_ID and not safe.startswith("."):  # hidden, or the folder itself
        return safe
    digest = hashlib.sha256("\0".join(labels).encode()).hexdigest()[:8]
    return f"{safe[:LONGEST_ID].lstrip('.')}-{digest}"


def _tokens_per_step(config: Config) -> int:
    return config.training.global_batch_size * config.data.sequence_length


def _flops_per_step(config: Config) -> int:
    return flops_per_token(config.model, config.row_length) * config.row_length * config.training.global_batch_size


def _sections(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in Config.model_fields}


def _of_data(sections: Mapping[str, Any]) -> str:
    """What the checks of data read: the data, which samples are drawn, and what of the model depends on the tokenizer."""
    model, run = (sections.get(name) for name in ("model", "run"))
    whole = [repr(sections.get(name)) for name in ("data", "training", "validation", "parallel")]
    ids = (model.vocab_size, model.end_of_document, model.kind) if isinstance(model, ModelConfig) else None
    return repr((*whole, ids, run.seed if isinstance(run, RunConfig) else None))


def _faults_of(study: Study, wrong: Mapping[str, Sequence[str]], sound: int) -> UserError:
    """One error that lists the children at fault, those with the same fault together."""
    names = {name for of_fault in wrong.values() for name in of_fault}
    lines = [f"  {_listed(children)}: {fault}" for fault, children in wrong.items()]
    if len(lines) > SHOWN_FAULTS:
        lines[SHOWN_FAULTS:] = [f"  and {len(lines) - SHOWN_FAULTS:,} other faults"]
    total = counted_children(len(names) + sound)
    return UserError(f"{study.path}: {len(names):,} of {total} cannot run\n" + "\n".join(lines))


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
