"""Results of a study as a table on the terminal, CSV and JSON. Torch-free."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pretrain.report.plot import compact
from pretrain.studies.collected import Fit
from pretrain.studies.groups import FIGURES, Group, Part
from pretrain.studies.laws import Law, Refused
from pretrain.studies.pool import Member
from pretrain.studies.results import Run, Sizes
from pretrain.studies.spread import Difference, Spread

WIDTH = 100  # columns of the terminal
_NAME = 25
_LISTED = 24  # groups across parts
_COLUMNS = ("runs", "params", "KV B", "freedom", "tok/s", "GiB", "loss ± sd")
_WIDTHS = (4, 7, 6, 7, 7, 5, 15, 16)
_SIZES = tuple(Sizes.__dataclass_fields__)
_ROW = ("part", "child", "status", "error", "axes", "seed", "lr", *_SIZES, *(name for name in FIGURES if name not in _SIZES))
_AT_EQUAL = ("loss_at_equal_tokens", "bits_at_equal_tokens", "loss_at_equal_time", "bits_at_equal_time")


def terminal(part: Part, fits: Sequence[Fit]) -> Iterator[str]:
    """Lines of at most WIDTH columns: counts, the groups at their best learning rates, failures, laws."""
    yield f"{part.name}  {part.counts()}"
    if part.tuned:
        yield _line("", (*_COLUMNS, f"− {part.compared_to}"))
        for group in part.tuned:
            yield from _named(group.label, [*_own_cells(group, part.loss(group)), difference_words(part.compared(group))])
        yield from _notes(part)
    for run in part.runs:
        if run.error:
            yield _within(f"  {run.status} {run.name}: {' '.join(run.error.split())}")
    for fit in fits:
        yield from _wrapped(law_words(fit))


def across(members: Sequence[Member]) -> Iterator[str]:
    """Lines of groups of several parts, those with the lowest loss first."""
    yield f"across parts, {figure(members[0].group, 'tokens')} tokens of the same text"
    yield _line("", (*_COLUMNS, "− lowest"))
    for member in members[:_LISTED]:
        above = member.above(members[0]) if member is not members[0] else None
        yield from _named(member.label, [*_own_cells(member.group, member.loss), difference_words(above)])
    if len(members) > _LISTED:
        yield f"and {len(members) - _LISTED} more with a higher loss, in the page"


def _notes(part: Part) -> Iterator[str]:
    place = part.common("tokens")
    kind = "validation loss" if part.held_out else "training loss of the last steps"
    yield f"  {kind}; ± sd: over seeds; after − {part.compared_to} ± is the half of a 95 % interval"
    ends = {run.measured.tokens for run in part.finished if run.measured}
    if place and len(ends) > 1:
        yield f"  runs have different tokens; loss at {compact(place)} tokens is in the page, the CSV and the JSON"
    edges = [group.label for group in part.tuned if part.at_edge(group)]
    if edges:
        yield _within(f"  best learning rate at the edge of those tried: {'; '.join(edges)}")


def _own_cells(group: Group, loss: Spread | None) -> list[str]:
    return [
        str(len(group.runs)),
        *(figure(group, name) for name in ("parameters", "kv_bytes", "query_freedom", "tokens_per_second", "memory_gib")),
        "–" if loss is None else f"{loss.mean:.4f}" + (" ± " + f"{loss.deviation:.4f}" if loss.deviation is not None else ""),
    ]


def figure(group: Group, name: str) -> str:
    """A mean in few characters."""
    found = group.figures.get(name)
    return "–" if found is None else compact(round(found.mean, 3))


def difference_words(found: Difference | None) -> str:
    if found is None:
        return "–"
    half = "" if found.half is None else f" ± {found.half:.4f}" if found.half < 10 else " ± wide"
    return f"{found.mean:+.4f}".replace("-", "−") + half


def law_words(fit: Fit) -> str:
    """A law and its verdict, or why there is none."""
    law, name = fit.law, f"L({fit.what}) of {fit.series}"
    if isinstance(law, Refused):
        return f"{name}: {law.verdict}"
    return f"{name}: {law.floor:.3f} + {law.scale:.3g} {fit.what}^−{law.slope:.3f}; {law.verdict}"


def _named(label: str, cells: Sequence[str]) -> Iterator[str]:
    """A line, or two where the label is long."""
    if len(label) >= _NAME:
        yield _within(label)
        label = ""
    yield _line(label, cells)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{_NAME}}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _within(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _wrapped(line: str) -> Iterator[str]:
    yield from textwrap.wrap(line, WIDTH, subsequent_indent="    ", initial_indent="  ")


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
        "heads": {name: _spread(found) for name, found in heads_of(group).items()},
        "sets": {name: {kind: _spread(of) for kind, of in known.items()} for name, known in sets_of(group).items()},
        "equal_parameters": equal,
        "mha": reference.label if reference else None,
        "loss_minus_mha": asdict(against) | {"separated": against.separated} if against else None,
        "prr": _spread(part.retention(group)),
        "sha": single.label if single else None,
        "peop": _spread(part.elasticity(group)),
    }


def sets_of(group: Group) -> dict[str, dict[str, Spread | None]]:
    """Means of loss and bits per byte of each named validation set."""
    of_runs = [run.measured.sets if run.measured else {} for run in group.runs]
    names, kinds = dict.fromkeys(name for sets in of_runs for name in sets), ("loss", "bits_per_byte")
    return {name: {kind: group.spread(sets.get(name, {}).get(kind) for sets in of_runs) for kind in kinds} for name in names}


def heads_of(group: Group) -> dict[str, Spread]:
    """Means of the last figures of how alike heads are."""
    of_runs = [run.measured.heads if run.measured else {} for run in group.runs]
    names = dict.fromkeys(name for heads in of_runs for name in heads)
    last = {name: group.spread(heads[name][-1][1] if name in heads else None for heads in of_runs) for name in names}
    return {name: found for name, found in last.items() if found is not None}


def as_json(parts: Sequence[Part], fits: Sequence[Sequence[Fit]]) -> str:
    """Everything: runs, groups, laws."""
    found = [
        {
            "part": part.name,
            "axes": part.roles,
            "equal_tokens": part.common("tokens"),
            "equal_seconds": part.common("seconds"),
            "held_out": part.held_out,
            "runs": [{**_row(part, run), "axes": dict(run.axes), "match": run.match} for run in part.runs],
            "groups": [{"group": group.label, **summary(part, group)} for group in part.groups],
            "laws": [_law(fit) for fit in of_part],
        }
        for part, of_part in zip(parts, fits, strict=True)
    ]
    return json.dumps({"parts": found}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


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
