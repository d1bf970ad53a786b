"""`launch/compare.py`: what differs between a few runs, and what that costs and brings. Torch-free."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from string import ascii_uppercase

from configs.load import flat_fields
from configs.schema.base import as_yaml
from pretrain.report.page import html_page
from pretrain.report.plot import Axis, Point, Series, compact, figure, legend, plot
from pretrain.report.records import read_metrics
from pretrain.studies.groups import Part
from pretrain.studies.page import PAGE_STYLE, row
from pretrain.studies.results import Course, Run, read_run
from pretrain.studies.table import WIDTH

MOST = 10
_SAME = ("run.folder",)  # differs between any two runs
_SHOWN = 40  # characters of a field's value
_COLUMNS = ("params", "KV B", "freedom", "tok/s", "GiB", "seconds", "tokens", "loss", "@tokens", "@time")
_WIDTHS = (8, 7, 7, 8, 6, 8, 7, 8, 8, 8)
_SMOOTH = 100  # points of a curve of training losses or speeds


def read_runs(folders: Sequence[Path]) -> Part:
    """The runs of these folders, named by letters; each is compared as if it had finished."""
    runs = [read_run(folder) for folder in folders]
    named = [replace(run, name=letter, axes={"run": letter}) for letter, run in zip(ascii_uppercase, runs, strict=False)]
    return Part("", [replace(run, status="finished") for run in named])


def terminal(part: Part, folders: Sequence[Path]) -> Iterator[str]:
    """Lines of at most WIDTH columns: which run is which, what differs, figures."""
    for run, folder in zip(part.runs, folders, strict=True):
        yield from textwrap.wrap(f"{run.name}  {_title(run, folder)}", WIDTH, subsequent_indent="   ")
    yield ""
    for field, values in differences(part.runs).items():
        joined = "  ".join(f"{run.name} {value}" for run, value in zip(part.runs, values, strict=True))
        yield from textwrap.wrap(f"{field}: {joined}", WIDTH, subsequent_indent="    ")
    if not differences(part.runs):
        yield "the configurations are equal"
    yield ""
    yield "   " + "".join(f" {name:>{width}}" for name, width in zip(_COLUMNS, _WIDTHS, strict=True))
    for run in part.runs:
        yield f"{run.name:<3}" + "".join(f" {cell:>{width}}" for cell, width in zip(_cells(part, run), _WIDTHS, strict=True))
    yield from textwrap.wrap(_note(part), WIDTH)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The fields in which configurations differ, each with its values as in YAML, run by run."""
    trees = [dict(flat_fields(run.config)) for run in runs if run.config is not None]
    found = {}
    for field in trees[0]:
        values = [value if isinstance(value := tree.get(field), str) else as_yaml(value) for tree in trees]
        if field not in _SAME and len(set(values)) > 1:
            found[field] = [value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "…" for value in values]
    return found


def _title(run: Run, folder: Path) -> str:
    assert run.measured is not None
    assert run.config is not None
    steps, wanted = run.measured.steps, run.config.training.steps
    return f"{folder}" + ("" if steps >= wanted else f" ({steps:,} of {wanted:,} steps)")


def _cells(part: Part, run: Run) -> Iterator[str]:
    sizes, measured = run.sizes, run.measured
    assert sizes is not None
    assert measured is not None
    yield from (compact(sizes.parameters), compact(sizes.kv_bytes), compact(round(sizes.query_freedom, 1)))
    yield "–" if measured.tokens_per_second is None else compact(round(measured.tokens_per_second))
    yield "–" if measured.memory_gib is None else f"{measured.memory_gib:.2f}"
    yield from (f"{measured.seconds:,.0f}", compact(measured.tokens))
    for loss in (part.final(run), _at(part, run, "tokens"), _at(part, run, "seconds")):
        yield "–" if loss is None else f"{loss:.4f}"


def _at(part: Part, run: Run, along: Course) -> float | None:
    place = part.common(along)
    return part.at(run, along, place) if place else None


def _note(part: Part) -> str:
    kind = "validation loss" if part.held_out else "training loss"
    tokens, seconds = part.common("tokens"), part.common("seconds")
    equal = f"; @tokens: at {compact(tokens)}, @time: after {seconds:,.0f} s, which all have" if tokens and seconds else ""
    return f"{kind}{equal}; one run each, so a difference may be chance"


def page(part: Part, folders: Sequence[Path]) -> str:
    """The same with curves, as one HTML file."""
    names = [f"{run.name}  {folder.name}" for run, folder in zip(part.runs, folders, strict=True)]
    found = differences(part.runs)
    head = row(("", *(run.name for run in part.runs)), "th")
    rows = [row((field, *values)) for field, values in found.items()]
    differ = f"<table>{head}{''.join(rows)}</table>" if found else "<p>The configurations are equal.</p>"
    figures = [row(("Run", *_COLUMNS), "th")]
    figures += [row((name, *_cells(part, run))) for name, run in zip(names, part.runs, strict=True)]
    sections = [
        f'<h2>Figures</h2><div class="wide"><table>{"".join(figures)}</table></div><p>{escape(_note(part))}.</p>',
        f'<h2>What differs</h2><div class="wide">{differ}</div>',
        f'<h2>Along the runs</h2>{legend([(name, look) for look, name in enumerate(names)])}<div class="charts">',
        *_curves(part, names),
        "</div>",
    ]
    return html_page("Runs compared", "; ".join(map(str, folders)), sections, PAGE_STYLE)


def _curves(part: Part, names: Sequence[str]) -> Iterator[str]:
    axes: dict[Course, str] = {"tokens": "tokens", "seconds": "seconds of steps"}
    for along, label in axes.items():
        if any(run.curve is not None and run.curve.held_out for run in part.runs):
            series = [_held_out(run, name, look, along) for look, (run, name) in enumerate(zip(part.runs, names, strict=True))]
            title = f"Validation loss along {label}"
            yield figure(plot(title, Axis(label), Axis("nats per token"), series), title)
        yield _trained(part, names, "loss", along, Axis("nats per token"), f"Training loss along {label}")
    speeds = Axis("tokens per second", includes=(0.0,))
    yield _trained(part, names, "tokens_per_second", "tokens", speeds, "Speed along tokens")
    yield _trained(part, names, "grad_norm", "tokens", Axis("gradient norm", log=True), "Gradient norm along tokens")


def _held_out(run: Run, name: str, look: int, along: Course) -> Series:
    curve = run.curve
    if curve is None or not curve.held_out:
        return Series(name, look, [])
    places = getattr(curve, along)
    pairs = zip(places, curve.loss, strict=True)
    return Series(name, look, [Point(float(x), float(y), f"{name}: {y:.4f} at {compact(x)}") for x, y in pairs])


def _trained(part: Part, names: Sequence[str], key: str, along: Course, y: Axis, title: str) -> str:
    """A figure of all steps, as means of a hundredth of the run each."""
    series = []
    for look, (run, name) in enumerate(zip(part.runs, names, strict=True)):
        lines = [line for line in read_metrics(run.folder) if "seconds" in line and key in line]
        points, seconds = [], 0.0
        chunk = max(1, len(lines) // _SMOOTH)
        for start in range(0, len(lines), chunk):
            of_chunk = lines[start : start + chunk]
            seconds += sum(line["seconds"] for line in of_chunk)
            x = of_chunk[-1]["tokens"] if along == "tokens" else seconds
            points.append(Point(float(x), sum(line[key] for line in of_chunk) / len(of_chunk)))
        series.append(Series(name, look, points, marks=False))
    x_axis = Axis("tokens" if along == "tokens" else "seconds of steps")
    return figure(plot(title, x_axis, y, series), title)
