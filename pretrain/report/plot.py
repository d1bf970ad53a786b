"""Plots as SVG without a plotting library: lines, dots with spreads, bands, linear and logarithmic axes. Torch-free.

A series has one look on all plots of a page: a colour and a mark by its number. STYLE is the CSS of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from pretrain.report.svg import picture, text

# Okabe and Ito 2008, which the colour-blind can tell apart; the second of a pair is for dark displays.
_COLOURS = (
    ("#0072b2", "#4da3db"),
    ("#d55e00", "#f0883e"),
    ("#009e73", "#2bc79a"),
    ("#b8578c", "#de8fba"),
    ("#b27d00", "#e6b93f"),
    ("#3b3f46", "#d5d8de"),
    ("#2f9bd0", "#7fcdf5"),
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 42  # margins around the plotted area
_CHARACTER = 6.0  # pixels of one in the axis' font, a little too many

STYLE = (
    "".join(f".s{number} {{ color: {light} }}\n" for number, (light, _) in enumerate(_COLOURS))
    + "@media (prefers-color-scheme: dark) {\n"
    + "".join(f"  .s{number} {{ color: {dark} }}\n" for number, (_, dark) in enumerate(_COLOURS))
    + "}\n"
    "svg .line { fill: none; stroke: currentColor; stroke-width: 1.6 } svg .dashed { stroke-dasharray: 5 4 }\n"
    "svg .mark { fill: currentColor; stroke: var(--back); stroke-width: 1 }\n"
    "svg .bar { stroke: currentColor; stroke-width: 1.2; fill: none } svg .band { fill: currentColor; opacity: .16 }\n"
    "svg .touch { fill: transparent } svg .touched:hover .mark { stroke: currentColor; stroke-width: 5 }\n"
    ".legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .6rem 0; font-size: .88rem }\n"
    ".legend span { display: inline-flex; align-items: center; gap: .35rem }\n"
    ".legend b { color: var(--text); font-weight: 400 }\n"
)


@dataclass(frozen=True)
class Point:
    """A value with its spread, if it is known, and what is shown of it under the mouse."""

    x: float
    y: float
    title: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one look. `marks`: a mark for each; `line`: joined; `band`: spreads are one area instead of bars."""

    name: str
    look: int
    points: Sequence[Point]
    line: bool = True
    marks: bool = True
    band: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """`ticks` that are given are preferred to round numbers; the axis contains the values of `includes`.

    It ends at `most`: marks of values above stand at its end. `spreads`: series stand beside each other, over so many pixels.
    """

    label: str
    log: bool = False
    ticks: Sequence[float] = ()
    includes: Sequence[float] = ()
    most: float | None = None
    spreads: float = 0


@dataclass(frozen=True)
class _Scale:
    axis: Axis
    low: float
    high: float
    start: float
    end: float
    ticks: dict[float, str] = field(default_factory=dict)  # with their labels

    def place(self, value: float) -> float:
        value = min(value, self.high)
        low, high, at = (math.log(v) if self.axis.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def plot(title: str, x: Axis, y: Axis, series: Sequence[Series], width: int = 570, height: int = 330) -> str:
    """The picture. Points that a logarithmic axis cannot show are left out; without any left it says so."""
    shown = [Series(**{**vars(one), "points": list(_valid(one.points, x, y))}) for one in series]
    shown = [one for one in shown if one.points]
    if not shown:
        return picture(width, 60, title, [text(width / 2, 35, "nothing to show yet")])
    places = [point.x for one in shown for point in one.points]
    values = [value for one in shown for point in one.points for value in (point.y, point.low, point.high) if value is not None]
    across = _scale(x, places, _LEFT + x.spreads / 2, width - _RIGHT - x.spreads / 2, shifts=True)
    up = _scale(y, values, height - _BOTTOM, _TOP)
    parts = [*_frame(across, up, width, height)]
    for number, one in enumerate(shown):
        shift = x.spreads * (number / (len(shown) - 1) - 0.5) if len(shown) > 1 else 0.0
        moved = f' transform="translate({shift:.1f})"' if shift else ""
        parts += [f'<g class="{series_class(one.look)}"{moved}>', *_drawn(one, across, up), "</g>"]
    return picture(width, height, title, parts)


def figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def legend(names: Iterable[tuple[str, int]]) -> str:
    """HTML: the mark and the name of each series, by its look."""
    entries = []
    for name, look in names:
        swatch = f'<path class="line" d="M1 7H29"/>{mark(look, 15, 7)}'
        drawn = f'<svg width="30" height="14" viewBox="0 0 30 14" aria-hidden="true">{swatch}</svg>'
        entries.append(f'<span class="{series_class(look)}">{drawn}<b>{escape(name)}</b></span>')
    return f'<div class="legend">{"".join(entries)}</div>'


def series_class(look: int) -> str:
    return f"s{look % len(_COLOURS)}"


def mark(look: int, x: float, y: float) -> str:
    """A disc, square, triangle, diamond or upside-down triangle; neighbours in a list differ in colour and in mark."""
    r = 4.2
    match look % 5:
        case 0:
            return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
        case 1:
            return f'<rect class="mark" x="{x - 3.8:.1f}" y="{y - 3.8:.1f}" width="7.6" height="7.6"/>'
        case 2:
            path = f"M{x:.1f} {y - 5:.1f}l5 8.6h-10z"
        case 3:
            path = f"M{x:.1f} {y - 5.4:.1f}l5.4 5.4l-5.4 5.4l-5.4 -5.4z"
        case _:
            path = f"M{x:.1f} {y + 5:.1f}l5 -8.6h-10z"
    return f'<path class="mark" d="{path}"/>'


def compact(value: float, digits: int = 3) -> str:
    """A number in few characters: 1.25M, 64k, 0.003, 3e-05. `digits` that are told, one more below 1,000."""
    if value == 0:
        return "0"
    size = abs(value)
    for above, by, unit in ((1e15, 1e15, "P"), (1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= above * 0.99995:
            return f"{value / by:.{digits}g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.{digits + 1}g}"


def _valid(points: Iterable[Point], x: Axis, y: Axis) -> Iterator[Point]:
    for point in points:
        finite = math.isfinite(point.x) and math.isfinite(point.y)
        if finite and (point.x > 0 or not x.log) and (point.y > 0 or not y.log):
            yield point


def _scale(axis: Axis, values: Sequence[float], start: float, end: float, shifts: bool = False) -> _Scale:
    """With room around the values, so that no mark is cut off; `shifts`: labels stand beside each other."""
    values = [value for value in (*values, *axis.includes) if value > 0 or not axis.log]
    low, high = min(values), max(values)
    if axis.most is not None:
        high = max(low, min(high, axis.most))
    if axis.log:
        room = (high / low) ** 0.05 if high > low else 1.5
        low, high = low / room, high * room
    else:
        room = 0.06 * (high - low) or max(abs(high) * 0.02, 1e-9)
        low, high = (low if low in axis.includes else low - room), high + room
    scale = _Scale(axis, low, high, start, end)
    ticks = [tick for tick in axis.ticks or _round(low, high, axis.log) if low <= tick <= high]
    return _Scale(axis, low, high, start, end, _apart(scale, ticks, shifts))


def _round(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between two."""
    if log and high / low >= 4:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5) if high / low < 1e4 else (1,)
        return [step * 10.0**decade for decade in decades for step in steps]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * step) <= 6)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(scale: _Scale, ticks: Sequence[float], shifts: bool) -> dict[float, str]:
    """Those whose labels do not touch the one before, with labels that tell them apart."""
    places = sorted(set(ticks), key=scale.place)
    digits = next((digits for digits in range(3, 9) if len({compact(tick, digits) for tick in places}) == len(places)), 9)
    kept, last = dict[float, str](), -math.inf
    for tick in places:
        label = compact(tick, digits)
        half = len(label) * _CHARACTER / 2 if shifts else 7
        if scale.place(tick) - half > last + 4:
            kept[tick] = label
            last = scale.place(tick) + half
    return kept


def _frame(across: _Scale, up: _Scale, width: int, height: int) -> Iterator[str]:
    left, right, top, base = _LEFT, width - _RIGHT, _TOP, height - _BOTTOM
    for tick, label in up.ticks.items():
        at = up.place(tick)
        yield f'<path class="grid" d="M{left} {at:.1f}H{right}"/>' + text(left - 6, at + 4, label, "end")
    for tick, label in across.ticks.items():
        at = across.place(tick)
        yield f'<path class="grid" d="M{at:.1f} {top}V{base}"/>' + text(at, base + 15, label)
    yield f'<path class="axis" fill="none" d="M{left} {top}V{base}H{right}"/>'
    yield text((left + right) / 2, height - 8, across.axis.label + (" (log)" if across.axis.log else ""))
    middle, label = (top + base) / 2, up.axis.label + (" (log)" if up.axis.log else "")
    yield f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(label)}</text>'


def _drawn(one: Series, across: _Scale, up: _Scale) -> Iterator[str]:
    spread = [point for point in one.points if point.low is not None and point.high is not None]
    places = [(across.place(point.x), up.place(point.y)) for point in one.points]
    if one.band and len(spread) > 1:
        upper = [f"{across.place(point.x):.1f} {_within(up, point.high):.1f}" for point in spread]
        lower = [f"{across.place(point.x):.1f} {_within(up, point.low):.1f}" for point in reversed(spread)]
        yield f'<path class="band" d="M{"L".join([*upper, *lower])}Z"/>'
    if one.line and len(places) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        name = f"<title>{escape(one.name)}</title>"
        yield f'<path class="line{" dashed" if one.dashed else ""}" d="M{path}">{name}</path>'
    if one.marks:
        for point, (x, y) in zip(one.points, places, strict=True):
            yield f'<g class="touched">{"" if one.band else _bar(point, x, up)}{mark(one.look, x, y)}'
            yield f'<circle class="touch" cx="{x:.1f}" cy="{y:.1f}" r="9"/><title>{escape(point.title or one.name)}</title></g>'


def _bar(point: Point, x: float, up: _Scale) -> str:
    if point.low is None or point.high is None or point.low == point.high:
        return ""
    low, high = _within(up, point.low), _within(up, point.high)
    return f'<path class="bar" d="M{x - 3:.1f} {low:.1f}h6m-3 0V{high:.1f}m-3 0h6"/>'


def _within(up: _Scale, value: float | None) -> float:
    assert value is not None
    return up.place(max(value, up.low))
