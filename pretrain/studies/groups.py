"""Runs of a study as groups of equal runs but for their seeds: means, references, the best learning rate. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import exp
from typing import Literal

from configs.words import counted
from model.costs.solve import TOLERANCE
from pretrain.studies.results import Course, Run
from pretrain.studies.spread import Difference, Spread, difference

Role = Literal["seed", "variant", "size", "heads", "budget", "rate", "other"]
# What an axis of a study changes: by the field that it is named after, or by what its labels decide, the first that fits.
_FIELDS: dict[str, Role] = {
    "run.seed": "seed",
    "model.attention": "variant",
    "model.hidden_size": "size",
    "model.num_layers": "size",
    "model.num_heads": "heads",
    "training.steps": "budget",
    "optimizer.lr": "rate",
}
_FACTS: dict[Role, Callable[[Run], Hashable]] = {
    "seed": lambda run: run.config and run.config.run.seed,
    "variant": lambda run: run.sizes and run.sizes.variant,
    "size": lambda run: run.sizes and (run.sizes.width, run.sizes.layers),
    "heads": lambda run: run.sizes and run.sizes.num_heads,
    "budget": lambda run: run.config and run.config.training.steps * run.config.training.global_batch_size,
    "rate": lambda run: run.config and run.config.optimizer.lr,
}
FIGURES: dict[str, Callable[[Run], float | None]] = {
    **{
        name: lambda run, name=name: getattr(run.sizes, name)  # type: ignore[misc]
        for name in ("parameters", "attention_parameters", "kv_bytes", "flops_per_token", "query_freedom")
    },
    **{
        name: lambda run, name=name: getattr(run.measured, name)  # type: ignore[misc]
        for name in (
            *("steps", "tokens", "seconds", "flops", "tokens_per_second", "memory_gib"),
            *("training_loss", "loss", "bits_per_byte"),
        )
    },
    "wall_seconds": lambda run: run.wall_seconds,
}
Key = tuple[tuple[str, str], ...]  # axes and their labels


def roles_of(runs: Sequence[Run]) -> dict[str, Role]:
    """What each axis of a part changes; axes of one label only are left out."""
    known = [run for run in runs if run.sizes is not None]
    roles: dict[str, Role] = {}
    for axis in dict.fromkeys(axis for run in runs for axis in run.axes):
        if len({run.axes.get(axis) for run in runs}) > 1:
            decided = [role for role, fact in _FACTS.items() if _decides(known, axis, fact)]
            roles[axis] = _FIELDS.get(axis) or [*decided, "other"][0]
    return roles


def _decides(runs: Sequence[Run], axis: str, fact: Callable[[Run], Hashable]) -> bool:
    values: dict[str | None, set[Hashable]] = {}
    for run in runs:
        values.setdefault(run.axes.get(axis), set()).add(fact(run))
    return all(len(of_label) == 1 for of_label in values.values()) and len(set().union(*values.values())) > 1


@dataclass(eq=False)
class Group:
    """Finished runs of a part that differ in their seeds only."""

    key: Key  # without the seed
    roles: Mapping[str, Role]
    runs: list[Run]

    @cached_property
    def label(self) -> str:
        """Such as mhe_add, 64 heads, lr 0.003; the part's name if it is the only one."""
        return self.without() or self.runs[0].part or self.runs[0].name

    def without(self, *roles: Role) -> str:
        """The label, but for axes with these roles."""
        return words(self.rest(*roles), self.roles)

    def rest(self, *roles: Role) -> Key:
        """The key without axes of these roles."""
        return tuple((axis, label) for axis, label in self.key if self.roles[axis] not in roles)

    def label_of(self, axis: str) -> str | None:
        return dict(self.key).get(axis)

    @property
    def variant(self) -> str:
        sizes = self.runs[0].sizes
        return sizes.variant if sizes else ""

    @property
    def heads(self) -> int:
        sizes = self.runs[0].sizes
        return sizes.num_heads if sizes else 0

    @property
    def rate(self) -> float:
        config = self.runs[0].config
        return config.optimizer.lr if config else 0.0

    @cached_property
    def figures(self) -> dict[str, Spread]:
        """Those that all its runs have."""
        found = {name: [value for run in self.runs if (value := figure(run)) is not None] for name, figure in FIGURES.items()}
        return {name: Spread.of(values) for name, values in found.items() if len(values) == len(self.runs)}

    def spread(self, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return Spread.of(known) if known and len(known) == len(self.runs) else None

    def by_seed(self, value: Callable[[Run], float | None]) -> dict[int, float]:
        found = ((run.config.run.seed, value(run)) for run in self.runs if run.config)
        return {seed: known for seed, known in found if known is not None}

    def sets(self) -> dict[str, dict[str, Spread | None]]:
        """Means of loss and bits per byte of each named validation set."""
        of_runs = [run.measured.sets if run.measured else {} for run in self.runs]
        names, kinds = dict.fromkeys(name for sets in of_runs for name in sets), ("loss", "bits_per_byte")
        return {name: {kind: self.spread(sets.get(name, {}).get(kind) for sets in of_runs) for kind in kinds} for name in names}

    def alike(self) -> dict[str, Spread]:
        """Means of the last figures of how alike heads are."""
        of_runs = [run.measured.heads if run.measured else {} for run in self.runs]
        names = dict.fromkeys(name for heads in of_runs for name in heads)
        last = {name: self.spread(heads[name][-1][1] if name in heads else None for heads in of_runs) for name in names}
        return {name: found for name, found in last.items() if found is not None}


def words(key: Key, roles: Mapping[str, Role]) -> str:
    """Labels of axes for people: mhe_add, 64 heads."""
    return ", ".join(_words(axis, label, roles[axis]) for axis, label in key)


def _words(axis: str, label: str, role: Role) -> str:
    if role in ("variant", "size") and "." not in axis:
        return label
    if role == "variant":
        return label
    if role == "heads":
        return f"{label} head{'s' * (label != '1')}"
    if role == "rate":
        return f"lr {label}"
    return f"{axis.rpartition('.')[2]} {label}"


@dataclass(eq=False)
class Part:
    """The runs of one part of a study, or runs that are compared."""

    name: str
    runs: list[Run]
    groups: list[Group] = field(init=False)
    roles: dict[str, Role] = field(init=False)

    def __post_init__(self) -> None:
        self.roles = roles_of(self.runs)
        groups: dict[Key, Group] = {}
        for run in self.finished:
            key = self._key(run, "seed")
            groups.setdefault(key, Group(key, self.roles, [])).runs.append(run)
        self.groups = list(groups.values())

    def _key(self, run: Run, *without: Role) -> Key:
        """Its labels, but for axes with these roles and those of one label."""
        return tuple(
            (axis, label) for axis, label in run.axes.items() if self.roles.get(axis, "seed") not in (*without, "seed")
        )

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.usable]

    def axes(self, *roles: Role) -> list[str]:
        return [axis for axis, role in self.roles.items() if role in roles]

    @cached_property
    def held_out(self) -> bool:
        """Whether losses are those of validations."""
        return all(run.curve is not None and run.curve.held_out for run in self.finished)

    def common(self, along: Course) -> float | None:
        """The most tokens or seconds that all finished runs have."""
        ends = [run.curve.end(along) if run.curve else None for run in self.finished]
        known = [end for end in ends if end is not None]
        return min(known) if known and len(known) == len(ends) else None

    def final(self, run: Run) -> float | None:
        """The loss of its last validation; the training loss in a part in which not every run has one."""
        if run.measured is None:
            return None
        return run.measured.loss if self.held_out else run.measured.training_loss

    def at(self, run: Run, along: Course, place: float, bits: bool = False) -> float | None:
        """Its loss after so many tokens or seconds; None if it is not of the kind that the part compares."""
        if run.curve is None or run.curve.held_out != self.held_out:
            return None
        return run.curve.at(along, place, bits)

    def at_equal(self, group: Group, along: Course, bits: bool = False) -> Spread | None:
        """The loss of a group's runs at the most tokens or seconds that all runs have."""
        place = self.common(along)
        if place is None:
            return None
        return group.spread(self.at(run, along, place, bits) for run in group.runs)

    def loss(self, group: Group) -> Spread | None:
        return group.spread(map(self.final, group.runs))

    @cached_property
    def tuned(self) -> list[Group]:
        """Of groups that differ in the learning rate alone, the one with the lowest loss."""
        best: dict[Key, Group] = {}
        for group in self.groups:
            loss, before = self.loss(group), best.get(group.rest("rate"))
            known = self.loss(before) if before else None
            if before is None or (loss is not None and (known is None or loss.mean < known.mean)):
                best[group.rest("rate")] = group
        return list(best.values())

    def rates(self, group: Group) -> list[float]:
        """The learning rates that were tried for what is otherwise this group, those that failed included."""
        same, tried = group.rest("rate"), set[float]()
        for run in self.runs:
            if run.config is not None and run.status in ("finished", "failed") and same == self._key(run, "seed", "rate"):
                tried.add(run.config.optimizer.lr)
        return sorted(tried)

    def at_edge(self, group: Group) -> bool:
        """Whether its rate is the lowest or the highest that was tried: a better one may lie beyond."""
        rates = self.rates(group)
        return len(rates) > 1 and group.rate in (rates[0], rates[-1])

    def reference(self, group: Group, variant: str) -> Group | None:
        """The tuned group of a variant with as many heads, and the same labels of all axes that both have."""
        own = dict(group.rest("variant", "rate"))
        found = [
            other
            for other in self.tuned
            if other.variant == variant
            and other.heads == group.heads
            and all(own.get(axis, label) == label for axis, label in other.rest("variant", "rate"))
        ]
        return found[0] if found else None

    @cached_property
    def lowest(self) -> Group | None:
        """The tuned group with the lowest loss."""
        known = [(loss.mean, number) for number, group in enumerate(self.tuned) if (loss := self.loss(group))]
        return self.tuned[min(known)[1]] if known else None

    @cached_property
    def compared_to(self) -> Literal["mha", "lowest"]:
        """What a column of differences is taken from: mha with as many heads, if there is that, else the lowest loss."""
        references = [self.reference(group, "mha") for group in self.tuned if group.variant != "mha"]
        return "mha" if any(references) else "lowest"

    def compared(self, group: Group) -> Difference | None:
        """Its loss minus that of `compared_to`; None for what it is compared to, and where there is none."""
        other = self.reference(group, "mha") if self.compared_to == "mha" else self.lowest
        return None if other is None or other is group else self.against(group, other)

    def against(self, group: Group, other: Group) -> Difference | None:
        """Its final losses minus those of another group."""
        values, others = group.by_seed(self.final), other.by_seed(self.final)
        return difference(values, others) if values and others else None

    def retention(self, group: Group) -> Spread | None:
        """PRR of perplexity: 1 − (ppl − ppl_MHA) / ppl_MHA, seed by seed, or against the reference's mean."""
        reference = self.reference(group, "mha")
        if reference is None:
            return None
        return self._scores(group, reference, lambda own, other: 1 - (own - other) / other)

    def elasticity(self, group: Group) -> Spread | None:
        """PEoP: % of perplexity that it gains over SHA for each % of attention parameters that it has more."""
        reference = self.reference(group, "sha")
        if reference is None or reference is group:
            return None
        own, other = (each.runs[0].sizes for each in (group, reference))
        assert own is not None
        assert other is not None
        more = own.attention_parameters / other.attention_parameters - 1
        if more == 0:
            return None
        return self._scores(group, reference, lambda own, other: (other - own) / other / more)

    def _scores(self, group: Group, reference: Group, score: Callable[[float, float], float]) -> Spread | None:
        """Of perplexities: each seed's against that of the same seed; against the reference's mean where it lacks one."""
        own, others = group.by_seed(self.final), reference.by_seed(self.final)
        if not own or not others:
            return None
        mean = sum(map(exp, others.values())) / len(others)
        paired = own.keys() <= others.keys()
        return Spread.of([score(exp(loss), exp(others[seed]) if paired else mean) for seed, loss in own.items()])

    def same_parameters(self, group: Group, other: Group) -> bool:
        """Within what `--match` calls equal."""
        own, wanted = group.figures["parameters"].mean, other.figures["parameters"].mean
        return abs(own - wanted) <= TOLERANCE * wanted

    def counts(self) -> str:
        """How many runs there are of each status."""
        statuses = [run.status for run in self.runs]
        known = [(statuses.count(status), status) for status in ("finished", "running", "stopped", "failed", "missing")]
        return f"{counted(len(statuses), 'run')}: " + ", ".join(f"{count} {status}" for count, status in known if count)
