"""Layouts that a run can have on a cluster, each with its plan, and why it wins or loses. Torch-free until memory is asked.

An axis of the search is an `Axis`: it says which values of which fields to try. A further one is an entry of `AXES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from configs.load import Check
from configs.schema import Config, Fault, Section, cross_faults
from pretrain.planning.cluster import Cluster
from pretrain.planning.plan import Plan, plan

Changes = Mapping[str, object]  # values by dotted fields
GIB = 2**30
TELLING = 0.03  # share of a step from which a loss is a reason
LOST = {
    "bubble": "pipeline bubble",
    "repeated": "recomputation",
    "waiting": "launching kernels",
    "slowed": "contention",
    "optimizer": "optimizer",
}


class Axis(Protocol):
    """What a search varies: the values of some fields, given the run as it is, its ranks and its cluster."""

    def __call__(self, config: Config, ranks: int, cluster: Cluster) -> Iterable[Changes]: ...


def tensor(config: Config, ranks: int, cluster: Cluster) -> Iterable[Changes]:
    """Tensor parallelism within a node, with sequence parallelism."""
    for size in _powers(min(ranks, cluster.per_node)):
        yield {"parallel.tensor": size, "parallel.sequence": size > 1}


def sharding(config: Config, ranks: int, cluster: Cluster) -> Iterable[Changes]:
    """Pipelines, and without them ZeRO 1 to 3 and FSDP, over all ranks or those of a node."""
    zero = {"backend": "deepspeed", "parallel.replicate": 1, "training.compile": False, "parallel.pipeline": 1}
    fsdp = {"backend": "fsdp", "parallel.zero_stage": 1, "parallel.pipeline": 1, "training.compile": config.training.compile}
    fsdp |= {"parallel.pipeline_balance": "parameters"}
    if config.training.precision != "fp8":
        yield from ({**zero, "parallel.zero_stage": stage} for stage in (1, 2, 3))
        for stages in _powers(min(ranks, config.model.num_layers))[1:]:
            yield {**zero, "parallel.zero_stage": 1, "parallel.pipeline": stages}
    for replicas in _powers(max(1, ranks // cluster.per_node)):
        yield {**fsdp, "parallel.replicate": replicas}


def micro_batch(config: Config, ranks: int, cluster: Cluster) -> Iterable[Changes]:
    """Samples of a micro-batch."""
    yield from ({"training.micro_batch_size": size} for size in _powers(min(32, config.training.global_batch_size)))


def recomputation(config: Config, ranks: int, cluster: Cluster) -> Iterable[Changes]:
    """Activations kept, or computed again."""
    yield from ({"training.recompute_activations": on} for on in (False, True))


AXES: tuple[Axis, ...] = (tensor, sharding, micro_batch, recomputation)


@dataclass(frozen=True)
class Candidate:
    """A layout: its plan, and the fields that differ from the run as it was given."""

    plan: Plan
    changes: Changes

    @property
    def reasons(self) -> list[str]:
        """What it loses, the largest first: memory that does not fit, or shares of a step."""
        if not self.plan.fits:
            return [f"does not fit: {self.plan.over / GIB:,.1f} GiB over"]
        return losses(self.plan) or [f"nothing above {TELLING:.0%}"]


def candidates(
    config: Config, ranks: int, cluster: Cluster, checks: Sequence[Check], axes: Sequence[Axis] = AXES
) -> list[Candidate]:
    """All layouts that pass the checks of a run, whether or not they fit."""
    found = []
    for parts in product(*(list(axis(config, ranks, cluster)) for axis in axes)):
        changes = {field: value for part in parts for field, value in part.items()}
        changed = with_fields(config, changes)
        if _divides(changed, ranks) and not layout_faults(changed, ranks, checks):
            differs = {field: value for field, value in changes.items() if _value(config, field) != value}
            found.append(Candidate(plan(changed, ranks, cluster), differs))
    return found


def best(found: Iterable[Candidate], count: int) -> list[Candidate]:
    """For each kind of layout the fastest that fits, or that which misses least; of these the best `count`, in order.

    Micro-batch, recomputation and replicas are no kinds of their own. What computes longer than a complete step of those found
    so far is not looked at.
    """
    kinds: dict[tuple[object, ...], list[Candidate]] = {}
    for one in sorted(found, key=lambda each: each.plan.computing):
        kinds.setdefault(_kind(one.plan.config), []).append(one)
    chosen: list[Candidate] = []
    for members in kinds.values():  # in the order of their fastest
        worst = chosen[count - 1].plan if len(chosen) >= count else None
        if worst is not None and worst.fits and members[0].plan.computing > worst.step.total:
            break
        chosen = sorted([*chosen, _best_of(members)], key=lambda one: (not one.plan.fits, one.plan.step.total))
    return chosen[:count]


def _best_of(members: Sequence[Candidate]) -> Candidate:
    """Of one kind, by how long they compute."""
    fitting: list[Candidate] = []
    for one in members:
        if fitting and one.plan.computing > fitting[0].plan.step.total:
            break
        if one.plan.fits:
            fitting = sorted([*fitting, one], key=lambda each: each.plan.step.total)
    return fitting[0] if fitting else min(members, key=lambda one: one.plan.over)


def smallest_change(found: Sequence[Candidate]) -> Candidate | None:
    """Of the layouts that fit, the one that changes fewest fields, and of those the fastest. None if none fits."""
    for count in sorted({len(one.changes) for one in found}):
        fitting = [one for one in found if len(one.changes) == count and one.plan.fits]
        if fitting:
            return min(fitting, key=lambda one: one.plan.step.total)
    return None


def losses(of: Plan) -> list[str]:
    """What a step takes besides computing the model once, in words, the largest first, from `TELLING` on."""
    step = of.step
    lost = {f"{text} {{}}": getattr(step, part) for part, text in LOST.items()}
    for timed in step.transfers:
        transfer = timed.transfer
        text = f"{transfer.axis} {transfer.op.replace('_', '-')} {{}}"
        lost[text] = lost.get(text, 0.0) + timed.exposed
    largest = sorted(lost.items(), key=lambda item: -item[1])
    return [text.format(f"{seconds / step.total:.0%}") for text, seconds in largest if seconds > TELLING * step.total]


def with_fields(config: Config, changes: Changes) -> Config:
    """The configuration with values of dotted fields."""
    sections: dict[str, dict[str, object]] = {}
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    updates: dict[str, object] = dict(sections.pop("", {}))
    for section, fields in sections.items():
        held: Section = getattr(config, section)
        updates[section] = held.model_copy(update=fields)
    return config.model_copy(update=updates)


def _value(config: Config, name: str) -> object:
    section, _, field = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, field)


def _divides(config: Config, ranks: int) -> bool:
    """Whether ranks, samples and micro-batches divide: what most candidates fail, before all checks."""
    parallel, training = config.parallel, config.training
    data, rest = divmod(ranks, parallel.tensor * parallel.pipeline)
    if rest or data % parallel.replicate:
        return False
    micro_batches, rest = divmod(training.global_batch_size, training.micro_batch_size * data)
    return not rest and micro_batches >= max(1, parallel.pipeline)


def layout_faults(config: Config, ranks: int, checks: Sequence[Check]) -> list[Fault]:
    """What is wrong with a configuration on so many ranks."""
    sections = {name: getattr(config, name) for name in Config.model_fields}
    return [*cross_faults(sections, ranks), *(fault for check in checks for fault in check(sections))]


def _kind(config: Config) -> tuple[object, ...]:
    parallel = config.parallel
    return config.backend, parallel.zero_stage, parallel.tensor, parallel.pipeline


def _powers(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
