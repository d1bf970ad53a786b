"""Results of a study as CSV and JSON. Torch-free."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pretrain.studies.collected import Fit
from pretrain.studies.findings import findings, matched
from pretrain.studies.groups import FIGURES, Group, Part
from pretrain.studies.laws import Law
from pretrain.studies.pool import Member, pools
from pretrain.studies.results import Run, Sizes
from pretrain.studies.spread import Spread

_SIZES = tuple(Sizes.__dataclass_fields__)
_ROW = ("part", "child", "status", "error", "axes", "seed", "lr", *_SIZES, *(name for name in FIGURES if name not in _SIZES))
_AT_EQUAL = ("loss_at_equal_tokens", "bits_at_equal_tokens", "loss_at_equal_time", "bits_at_equal_time")


def rows_csv(parts: Sequence[Part]) -> str:
    """A line for each run."""
    sets = sorted({name for part in parts for run in part.runs if run.measured for name in run.measured.sets})
    of_sets = [(name, kind) for name in sets for kind in ("loss", "bits_per_byte")]
    rows = []
    for part in parts:
        for run in part.runs:
            row = _row(part, run)
            measured = run.measured.sets if run.measured else {}
            row |= {f"{name}/{kind}": measured.get(name, {}).get(kind) for name, kind in of_sets}
            rows.append(row)
    return _csv([*_ROW, *_AT_EQUAL, *(f"{name}/{kind}" for name, kind in of_sets)], rows)


def _row(part: Part, run: Run) -> dict[str, Any]:
    sizes = asdict(run.sizes) if run.sizes else {}
    figures = {name: get(run) for name, get in FIGURES.items() if name not in _SIZES} if run.sizes and run.measured else {}
    return {
        "part": part.name,
        "child": run.name,
        "status": run.status,
        "error": run.error,
        "axes": "; ".join(f"{axis}={label}" for axis, label in run.axes.items()),
        "seed": run.config.run.seed if run.config else None,
        "lr": run.config.optimizer.lr if run.config else None,
        **sizes,
        **figures,
        **dict(zip(_AT_EQUAL, (_at_equal(part, run, name) for name in _AT_EQUAL), strict=True)),
    }


def _at_equal(part: Part, run: Run, name: str) -> float | None:
    along, bits = ("tokens" if name.endswith("tokens") else "seconds"), name.startswith("bits")
    place = part.common(along)  # type: ignore[arg-type]
    return part.at(run, along, place, bits) if place and run.usable else None  # type: ignore[arg-type]


def groups_csv(parts: Sequence[Part]) -> str:
    """A line for each group of runs that differ in their seeds alone: mean, standard deviation and number of every figure."""
    rows = [{"part": part.name, "group": group.label, **_flat(summary(part, group))} for part in parts for group in part.groups]
    names = dict.fromkeys(name for row in rows for name in row)
    nested = {name.rpartition(".")[0] for name in names}
    return _csv([name for name in names if name not in nested], rows)


def summary(part: Part, group: Group) -> dict[str, Any]:
    """Figures of a group as means with spreads, and its comparisons."""
    reference, single = part.reference(group, "mha"), part.reference(group, "sha")
    against = part.against(group, reference) if reference is not None and reference is not group else None
    equal = [other.label for other in part.groups if other is not group and part.same_parameters(group, other)]
    return {
        "axes": dict(group.key),
        "variant": group.variant,
        "num_heads": group.heads,
        "lr": group.rate,
        "best_lr": group in part.tuned,
        "best_lr_at_edge": group in part.tuned and part.at_edge(group),
        "match": group.runs[0].match,
        "seeds": sorted(run.config.run.seed for run in group.runs if run.config),
        **{name: _spread(found) for name, found in group.figures.items()},
        **{
            name: _spread(part.at_equal(group, "tokens" if name.endswith("tokens") else "seconds", name.startswith("bits")))
            for name in _AT_EQUAL
        },
        "heads": {name: _spread(found) for name, found in group.alike().items()},
        "sets": {name: {kind: _spread(of) for kind, of in known.items()} for name, known in group.sets().items()},
        "equal_parameters": equal,
        "mha": reference.label if reference else None,
        "loss_minus_mha": asdict(against) | {"separated": against.separated} if against else None,
        "prr": _spread(part.retention(group)),
        "sha": single.label if single else None,
        "peop": _spread(part.elasticity(group)),
    }


def as_json(parts: Sequence[Part], fits: Sequence[Sequence[Fit]]) -> str:
    """Everything: runs, groups, findings, laws, and what is compared across parts."""
    found = [
        {
            "part": part.name,
            "axes": part.roles,
            "equal_tokens": part.common("tokens"),
            "equal_seconds": part.common("seconds"),
            "held_out": part.held_out,
            "findings": list(findings(part)),
            "runs": [{**_row(part, run), "axes": dict(run.axes), "match": run.match} for run in part.runs],
            "groups": [{"group": group.label, **summary(part, group)} for group in part.groups],
            "laws": [_law(fit) for fit in of_part],
        }
        for part, of_part in zip(parts, fits, strict=True)
    ]
    across = [{"findings": list(matched(members)), "groups": list(map(_member, members))} for members in pools(parts)]
    return json.dumps({"parts": found, "across": across}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _member(member: Member) -> dict[str, Any]:
    return {"part": member.part.name, "group": member.group.label, "loss": _spread(member.loss)}


def _law(fit: Fit) -> dict[str, Any]:
    law, known = fit.law, {}
    if isinstance(law, Law):
        known = {name: getattr(law, name) for name in ("floor", "scale", "slope", "low", "high", "sizes", "runs")}
        known |= {f"{name}_95": law.interval(number) for number, name in enumerate(("floor", "scale", "slope"))}
        known |= {"loss_at_high_95": law.band(law.high), "loss_at_ten_times_high_95": law.band(10 * law.high)}
    return {"law": f"L({fit.what})", "series": fit.series, "verdict": law.verdict, "points": fit.points, **known}


def _spread(found: Spread | None) -> dict[str, Any] | None:
    return asdict(found) if found else None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = "; ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _csv(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: _cell(row.get(name)) for name in names} for row in rows)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
