"""What the page of a study shows of a part: loss against sizes, speed and memory, learning rates, courses, laws. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean, median

import numpy as np

from pretrain.report.plot import Axis, Point, Series, compact, figure, legend, plot
from pretrain.studies.collected import LAWS, Fit
from pretrain.studies.groups import Group, Key, Part, words
from pretrain.studies.laws import Law
from pretrain.studies.pool import Member
from pretrain.studies.results import Course
from pretrain.studies.spread import Spread

SPREAD = 10  # pixels over which series with as many heads stand beside each other
WIDE = 44  # the same where most series have one value
START = 0.2  # the share of a course that is left out at its beginning, where losses fall from those of random weights
BEYOND = 3.0  # a law is drawn to so many times the largest size
Value = Callable[[Group], Spread | None]


class Charts:
    """The pictures of a part. A series has the same look on all of them; `names` is what a legend needs."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.series: dict[Key, list[Group]] = {}
        along = _along(part)
        for group in part.tuned:
            self.series.setdefault(_without(group, along), []).append(group)
        self.names = {key: words(key, part.roles) or part.name for key in self.series}
        self.looks = {key: number for number, key in enumerate(self.series)}
        self.of_groups = {group: key for key, groups in self.series.items() for group in groups}
        kind = "validation loss" if part.held_out else "training loss"
        self.loss = Axis(f"{kind} (nats per token)")
        heads = sorted({group.heads for group in part.tuned})
        self.heads = Axis("heads in a layer", log=True, ticks=heads, spreads=SPREAD)

    def legend(self) -> list[tuple[str, int]]:
        return [(self.names[key], look) for key, look in self.looks.items()]

    def against_sizes(self) -> Iterator[str]:
        """Loss against heads, query freedom, bytes of cache and parameters, where they differ; and at equal time."""
        heads = [group.heads for group in self.part.tuned]
        if len(set(heads)) > 1:
            yield self._plot("Loss against heads", self.heads, self.loss, _heads, self.part.loss)
        for name, label in (
            ("query_freedom", "query freedom of a layer"),
            ("kv_bytes", "bytes of cache a token"),
            ("parameters", "parameters"),
        ):
            values = {group.figures[name].mean for group in self.part.tuned}
            if len(values) > 1:
                wide = min(WIDE, SPREAD * (len(self.series) - 1) / 2) if len(values) <= 6 and name != "parameters" else 0
                axis = Axis(label, log=max(values) > 2 * min(values) > 0, ticks=_few(values), spreads=wide)
                yield self._plot(f"Loss against {label}", axis, self.loss, _mean(name), self.part.loss)
        if len(set(heads)) > 1 and (place := self.part.common("seconds")):
            title = f"Loss at equal time ({place:,.0f} s of steps), against heads"
            if any(self.part.at_equal(group, "seconds") for group in self.part.tuned):
                yield self._plot(title, self.heads, self.loss, _heads, lambda group: self.part.at_equal(group, "seconds"))

    def against_heads(self) -> Iterator[str]:
        """Speed and memory; against parameters where all have as many heads."""
        several = len({group.heads for group in self.part.tuned}) > 1
        sizes = [group.figures["parameters"].mean for group in self.part.tuned]
        axis = self.heads if several else Axis("parameters", log=max(sizes) > 2 * min(sizes))
        across = "heads" if several else "parameters"
        for name, label, title in (
            ("tokens_per_second", "tokens per second", "Speed"),
            ("memory_gib", "GiB, the highest of the run", "Memory"),
        ):
            means = [found.mean for group in self.part.tuned if (found := group.figures.get(name))]
            far = bool(means) and max(means) > 10 * min(means) > 0
            y, place = Axis(label, log=far, includes=() if far else (0.0,)), _heads if several else _mean("parameters")
            yield self._plot(f"{title} against {across}", axis, y, place, _figure(name))

    def of_axes(self) -> Iterator[str]:
        """Loss against every other axis whose labels are numbers, a line for all else equal."""
        for axis in self.part.axes("other"):
            numbers = _numbers(self.part, axis)
            if numbers is None:
                continue
            series: dict[Key, list[Group]] = {}
            for group in self.part.tuned:
                series.setdefault(_without(group, axis), []).append(group)
            names = {key: words(key, self.part.roles) or self.part.name for key in series}
            drawn = [
                self._series(names[key], look, groups, _labelled(axis), self.part.loss)
                for look, (key, groups) in enumerate(series.items())
            ]
            name = axis.rpartition(".")[2]
            x = Axis(name, log=numbers[0] > 0 and numbers[-1] > 3 * numbers[0], ticks=_few(numbers), spreads=SPREAD)
            own = legend([(names[key], look) for look, key in enumerate(series)])
            yield figure(plot(f"Loss against {name}", x, self.loss, drawn) + own, f"Loss against {name}")

    def basins(self) -> Iterator[str]:
        """Loss against the learning rate, a picture for each number of heads or size."""
        if not self.part.axes("rate"):
            return
        families: dict[str, dict[Key, list[Group]]] = {}
        for group in self.part.groups:
            family = _family(group)
            families.setdefault(family, {}).setdefault(group.rest("rate"), []).append(group)
        for family, of_rates in families.items():
            series, losses = [], []
            for groups in of_rates.values():
                look = self._look(groups[0])
                name = groups[0].without("rate")
                series.append(self._series(name, look, groups, lambda group: group.rate, self.part.loss))
                losses += [loss.mean for group in groups if (loss := self.part.loss(group))]
            rates = sorted({group.rate for groups in of_rates.values() for group in groups})
            y = Axis(self.loss.label, most=_most(losses))
            cut = "; values above the frame stand at its edge" if losses and max(losses) > _most(losses) else ""
            title = "Learning rates" + (f", {family}" if family else "")
            yield figure(plot(title, Axis("learning rate", log=True, ticks=rates), y, series), title + cut)

    def courses(self, along: Course) -> Iterator[str]:
        """Loss along tokens or seconds: means over seeds, a picture for each number of heads or size."""
        families: dict[str, list[Group]] = {}
        for group in self.part.tuned:
            families.setdefault(_family(group), []).append(group)
        for family, groups in families.items():
            series = [one for group in groups if (one := self._course(group, along)) is not None]
            title = f"Loss along {'tokens' if along == 'tokens' else 'seconds of steps'}" + (f", {family}" if family else "")
            x = Axis("tokens" if along == "tokens" else "seconds of steps")
            yield figure(plot(title, x, self.loss, series), title)

    def _course(self, group: Group, along: Course) -> Series | None:
        curves = [run.curve for run in group.runs if run.curve is not None]
        ends = [end for curve in curves if (end := curve.end(along))]
        if not ends:
            return None
        end = min(ends)
        places = [place for place in getattr(curves[0], along) if START * end <= place <= end]
        if along == "seconds":
            places = [*places[:-1], end] if places else []
        points = []
        for place in places:
            losses = [loss for curve in curves if (loss := curve.at(along, place)) is not None]
            if len(losses) == len(curves):
                title = f"{group.label}: {fmean(losses):.4f} at {compact(place)}"
                points.append(Point(float(place), fmean(losses), title, min(losses), max(losses)))
        return Series(group.label, self._look(group), points, marks=False, band=True)

    def alike(self) -> Iterator[str]:
        """How alike heads are along the runs (logging.heads), means over seeds."""
        names = dict.fromkeys(name for run in self.part.finished if run.measured for name in run.measured.heads)
        for name in names:
            series = [one for group in self.part.tuned if (one := self._telemetry(group, name)) is not None]
            title = f"{name.replace('_', ' ').capitalize()} along tokens"
            yield figure(plot(title, Axis("tokens"), Axis(name.replace("_", " ")), series), title)

    def _telemetry(self, group: Group, name: str) -> Series | None:
        of_runs = [dict(run.measured.heads.get(name, ())) for run in group.runs if run.measured]
        shared = sorted(set(of_runs[0]).intersection(*of_runs))
        points = []
        for tokens in shared:
            found = Spread.of([values[tokens] for values in of_runs])
            title = f"{group.label}: {found.words(5)} at {compact(tokens)}"
            points.append(Point(tokens, found.mean, title, found.low, found.high))
        return Series(group.label, self._look(group), points) if points else None

    def laws(self, fits: Sequence[Fit]) -> Iterator[str]:
        """Runs, laws and bands, a picture for each of N, D and C."""
        for what, (_, label, _) in LAWS.items():
            chosen = [fit for fit in fits if fit.what == what]
            series = [one for number, fit in enumerate(chosen) for one in _law_series(fit, number)]
            if series:
                caption = f"L({what}); bands: 95 % of bootstrap draws; dashed: beyond the largest run"
                own = legend([(fit.series, number) for number, fit in enumerate(chosen)])
                yield figure(plot(f"L({what})", Axis(label, log=True), self.loss, series) + own, caption)

    def _look(self, group: Group) -> int:
        """Of the series that it belongs to, whatever its learning rate."""
        key = self.of_groups.get(group)
        if key is None:
            key = next(self.of_groups[other] for other in self.part.tuned if other.rest("rate") == group.rest("rate"))
        return self.looks[key]

    def _plot(self, title: str, x: Axis, y: Axis, place: Callable[[Group], float], value: Value) -> str:
        series = [self._series(self.names[key], self.looks[key], groups, place, value) for key, groups in self.series.items()]
        return figure(plot(title, x, y, series), title)

    def _series(self, name: str, look: int, groups: Sequence[Group], place: Callable[[Group], float], value: Value) -> Series:
        points = []
        for group in groups:
            found = value(group)
            if found is not None:
                x = place(group)
                title = f"{group.label}: {_words(found)} at {compact(x)}"
                points.append(Point(x, found.mean, title, found.low, found.high))
        return Series(name, look, sorted(points, key=lambda point: point.x))


def pool_charts(members: Sequence[Member]) -> Iterator[str]:
    """Loss of groups of several parts against their sizes; a look for each part, `pool_legend`."""
    looks = dict(pool_legend(members))
    loss = Axis("validation loss (nats per token)" if members[0].part.held_out else "training loss (nats per token)")
    for label, place in (
        ("heads in a layer", _heads),
        ("query freedom of a layer", _mean("query_freedom")),
        ("bytes of cache a token", _mean("kv_bytes")),
        ("parameters", _mean("parameters")),
    ):
        values = {place(member.group) for member in members}
        if len(values) < 2:
            continue
        series = []
        for name, look in looks.items():
            own = [member for member in members if member.part.name == name]
            points = [
                Point(place(one.group), one.loss.mean, f"{one.label}: {one.loss.words()}", one.loss.low, one.loss.high)
                for one in own
            ]
            series.append(Series(name, look, points, line=False))
        wide = min(WIDE, SPREAD * (len(series) - 1) / 2) if len(values) <= 6 else 0
        x = Axis(label, log=max(values) > 2 * min(values) > 0, ticks=_few(values), spreads=wide)
        yield figure(plot(f"Loss against {label}", x, loss, series), f"Loss against {label}")


def pool_legend(members: Sequence[Member]) -> list[tuple[str, int]]:
    names = sorted({member.part.name for member in members})
    return [(name, look) for look, name in enumerate(names)]


def _along(part: Part) -> str | None:
    """The axis along which lines are drawn: of heads, else of sizes, else the one with the most numbers."""
    if axes := [*part.axes("heads"), *part.axes("size"), *part.axes("budget")]:
        return axes[0]
    counts = {axis: len(numbers) for axis in part.axes("other") if (numbers := _numbers(part, axis))}
    return max(counts, key=lambda axis: counts[axis]) if counts else None


def _without(group: Group, axis: str | None) -> Key:
    return tuple(pair for pair in group.rest("rate") if pair[0] != axis)


def _numbers(part: Part, axis: str) -> list[float] | None:
    """The labels of an axis, if they are two different numbers or more."""
    labels = {_number(group.label_of(axis)) for group in part.tuned}
    known = sorted(label for label in labels if label is not None)
    return known if len(known) == len(labels) > 1 else None


def _family(group: Group) -> str:
    """What has a picture of its own: the labels of heads, sizes and budgets."""
    return group.without("variant", "rate", "other", "seed")


def _words(found: Spread) -> str:
    if found.mean >= 1000:
        return f"{found.mean:,.0f}" + ("" if found.deviation is None else f" ± {found.deviation:,.0f}") + f" ({found.count})"
    return found.words()


def _law_series(fit: Fit, look: int) -> Iterable[Series]:
    points = [Point(x, loss, f"{fit.series}: {loss:.4f} at {compact(x)}") for x, loss in fit.points]
    yield Series(fit.series, look, points, line=False)
    if isinstance(fit.law, Law):
        for start, end, dashed in ((fit.law.low, fit.law.high, False), (fit.law.high, BEYOND * fit.law.high, True)):
            places = np.geomspace(start, end, 30)
            curve = [Point(float(x), fit.law.at(x), "", *fit.law.band(x)) for x in places]
            yield Series(f"{fit.series}: {fit.law.verdict}", look, curve, marks=False, band=True, dashed=dashed)


def _heads(group: Group) -> float:
    return float(group.heads)


def _figure(name: str) -> Value:
    return lambda group: group.figures.get(name)


def _mean(name: str) -> Callable[[Group], float]:
    return lambda group: group.figures[name].mean


def _labelled(axis: str) -> Callable[[Group], float]:
    return lambda group: _number(group.label_of(axis)) or 0.0


def _number(label: str | None) -> float | None:
    try:
        return float(label or "")
    except ValueError:
        return None


def _few(values: Iterable[float]) -> list[float]:
    """As ticks, unless they are too many."""
    distinct = sorted(set(values))
    return distinct if len(distinct) <= 6 else []


def _most(losses: Sequence[float]) -> float:
    """Where an axis of losses ends, so that one run that failed to learn does not flatten all others."""
    return min(losses) + 4 * (median(losses) - min(losses)) if losses else 0.0
