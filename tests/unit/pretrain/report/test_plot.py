"""Places of marks in plots by hand, ticks, and well-formed SVG."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from pretrain.report.plot import Axis, Point, Series, compact, legend, plot
from tests.unit.pretrain.report.pages import Page

LEFT, RIGHT, TOP, BASE = 58, 556, 10, 288  # the frame of a plot of 570 × 330


def discs(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'class="mark" cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_marks_on_linear_and_logarithmic_axes() -> None:
    points = [Point(1, 2.0), Point(10, 4.0, low=3.5, high=4.5), Point(100, 3.0)]
    svg = plot("title", Axis("heads", log=True), Axis("loss"), [Series("one", 0, points)])
    (x1, y1), (x2, y2), (x3, y3) = discs(svg)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(2 * (y3 - y2), abs=0.2)
    assert min(x1, BASE - y1, y2 - TOP, RIGHT - x3) > LEFT * 0.1  # nothing on the frame
    Page(svg)


def test_values_that_an_axis_cannot_show() -> None:
    svg = plot("title", Axis("x", log=True), Axis("y"), [Series("one", 0, [Point(0, 1), Point(2, float("nan")), Point(4, 1)])])
    assert len(discs(svg)) == 1
    assert "nothing to show yet" in plot("title", Axis("x"), Axis("y"), [Series("one", 0, [])])


def test_what_is_far_above_stands_at_the_edge() -> None:
    points = [Point(1, 3.0), Point(2, 3.1), Point(3, 50.0)]
    marks = discs(plot("title", Axis("x"), Axis("y", most=3.2), [Series("one", 0, points)]))
    assert marks[2][1] == pytest.approx(TOP)
    assert marks[0][1] - marks[1][1] > 50


def test_series_stand_beside_each_other() -> None:
    svg = plot("title", Axis("x", spreads=20), Axis("y"), [Series(name, 0, [Point(1, 1), Point(2, 2)]) for name in "abc"])
    assert re.findall(r'transform="translate\((-?[\d.]+)\)"', svg) == ["-10.0", "10.0"]
    assert len({x for x, _ in discs(svg)}) == 2


@pytest.mark.parametrize("values", [(1.0, 1.0001), (3.38, 3.61), (16, 128), (1e5, 3e9), (0.0003, 0.03), (5.0, 5.0)])
@pytest.mark.parametrize("log", [False, True])
def test_two_ticks_or_more_and_none_over_another(values: tuple[float, float], log: bool) -> None:
    svg = plot("title", Axis("x", log=log), Axis("y"), [Series("one", 0, [Point(value, 1 + value) for value in values])])
    labels = [(float(x), words) for x, words in re.findall(r'<text x="([\d.]+)" y="303.0" text-anchor="middle">([^<]+)<', svg)]
    assert len(labels) >= (1 if values[0] == values[1] or log else 2)
    assert len({words for _, words in labels}) == len(labels)
    for (x, words), (after, next_words) in pairwise(labels):
        assert after - x > 5.5 * (len(words) + len(next_words)) / 2


def test_numbers_in_few_characters() -> None:
    numbers = (0, 0.003, 3e-05, 64, 2048, 12_345, 999_960, 1.25e6, 2e9)
    assert [compact(number) for number in numbers] == ["0", "0.003", "3e-05", "64", "2,048", "12.3k", "1M", "1.25M", "2G"]


def test_names_are_escaped_and_neighbours_look_different() -> None:
    page = Page(legend([(f"<{look}>", look) for look in range(12)]))
    names = page.within("b#.")
    assert names == [f"<{look}>" for look in range(12)]
    looks = [(look % 7, look % 5) for look in range(35)]
    assert len(set(looks)) == 35
