"""All results of a study, part by part, with the laws that its runs allow. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import UserError
from pretrain.studies.groups import Group, Key, Part, Role
from pretrain.studies.laws import Law, Refused, fit_law
from pretrain.studies.records import CHILD
from pretrain.studies.results import read_child

What = Literal["N", "D", "C"]
# What a law is of: the figure, its name, and the axes along which it changes.
LAWS: dict[What, tuple[str, str, tuple[Role, ...]]] = {
    "N": ("parameters", "parameters N", ("size",)),
    "D": ("tokens", "tokens D", ("budget",)),
    "C": ("flops", "FLOPs C", ("size", "budget")),
}


@dataclass(frozen=True)
class Fit:
    """A law of the runs of one series, or why there is none; `points`: figure and loss of each run."""

    what: What
    series: str
    points: Sequence[tuple[float, float]]
    law: Law | Refused


Expected = Mapping[str, Mapping[str, Mapping[str, str]]]  # labels by axis, by the children's ids, by part


def collect(folder: Path, expected: Expected | None = None) -> list[Part]:
    """The parts of a study's folder. `expected`: all its children, in order; those without a folder are missing.

    UserError if there are none.
    """
    found, parts = _children(folder), list[Part]()
    for name, children in (found if expected is None else expected).items():
        parts.append(Part(name, [read_child(folder / name / child, name, axes) for child, axes in children.items()]))
    if not any(run.status != "missing" for part in parts for run in part.runs):
        raise UserError(f"{folder}: no run of the study has begun; start it with launch/sweep.py")
    return parts


def _children(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """The children that have a folder, by part; they say themselves what their labels are."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for path in sorted(folder.glob(f"*/*/{CHILD}"), key=_numbers_in_order):
        found.setdefault(path.parent.parent.name, {})[path.parent.name] = {}
    return found


def _numbers_in_order(path: Path) -> list[tuple[float, str]]:
    """Sorts 16 before 128."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", str(path.parent))
    return [(float(piece), "") if number % 2 else (-1.0, piece) for number, piece in enumerate(pieces)]


def laws(part: Part, seed: int = 0) -> list[Fit]:
    """L(N), L(D) and L(C) of each series of runs that differ in what the law is of, each at its best learning rate.

    N: at the most tokens that all runs have. D: of runs with different budgets, not along one run, whose learning rate has not
    yet decayed. C: of the runs that no run with fewer FLOPs beats.
    """
    fits = []
    for what, (_, _, along) in LAWS.items():
        series: dict[Key, list[Group]] = {}
        for group in part.tuned if part.axes(*along) else ():
            series.setdefault(group.rest("rate", *along), []).append(group)
        for groups in series.values():
            chosen = _frontier(part, groups) if what == "C" else groups
            points = list(_points(part, chosen, what))
            law = fit_law([x for x, _ in points], [loss for _, loss in points], seed) if points else Refused("no finished runs")
            fits.append(Fit(what, groups[0].without("rate", *along) or part.name, points, law))
    return fits


def _points(part: Part, groups: Iterable[Group], what: What) -> Iterable[tuple[float, float]]:
    figure = LAWS[what][0]
    for group in groups:
        for run in group.runs:
            if run.curve is None or run.measured is None or run.sizes is None:
                continue
            tokens = part.common("tokens") if what == "N" else run.curve.end("tokens")
            loss = run.curve.at("tokens", tokens) if tokens else None
            if loss is not None:
                yield float(run.sizes.parameters if figure == "parameters" else getattr(run.measured, figure)), loss


def _frontier(part: Part, groups: Sequence[Group]) -> list[Group]:
    """Those that none with as many FLOPs or fewer beats."""
    known = [(group.figures["flops"].mean, loss.mean, group) for group in groups if (loss := part.loss(group))]
    return [group for flops, loss, group in known if not any(c <= flops and other < loss for c, other, _ in known)]
