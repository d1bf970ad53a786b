"""Points of a part: products of axes, lists, and draws that stay the same."""

from __future__ import annotations

import math
from typing import Any

import pytest

from configs.schema import Fault
from pretrain.studies.points import Point, points

VARIANTS = {"mha": {"model.attention": "mha"}, "gqa": {"model.attention": "gqa", "model.num_kv_heads": 4}}


def sound(part: dict[str, Any]) -> list[Point]:
    faults: list[Fault] = []
    found = points(part, "parts.p", faults)
    assert faults == []
    return found


def test_a_grid_is_the_product_of_its_axes_in_order() -> None:
    found = sound({"grid": {"variant": VARIANTS, "optimizer.lr": [1e-3, 0.02]}})
    assert [point.named for point in found] == [("mha", "0.001"), ("mha", "0.02"), ("gqa", "0.001"), ("gqa", "0.02")]
    assert found[2].labels == {"variant": "gqa", "optimizer.lr": "0.001"}
    assert found[2].fields == {"model.attention": "gqa", "model.num_kv_heads": 4, "optimizer.lr": 1e-3}


def test_a_list_goes_with_a_grid_and_plain_names_are_labels() -> None:
    entries = [{"label": "small", "size": "S", "model.num_layers": 2}, {"label": "large", "size": "L", "model.num_layers": 9}]
    found = sound({"list": entries, "grid": {"run.seed": [0, 1]}})
    assert [point.named for point in found][:3] == [("small", "S", "0"), ("small", "S", "1"), ("large", "L", "0")]
    assert found[3].labels == {"label": "large", "size": "L", "model.num_layers": "9", "run.seed": "1"}
    assert found[3].fields == {"model.num_layers": 9, "run.seed": 1}
    assert [point.named for point in sound({"list": [{"model.num_layers": 2}]})] == [("2",)]


def test_draws_lie_in_their_ranges_and_stay_as_samples_and_axes_are_added() -> None:
    axes: dict[str, Any] = {"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}, "model.num_heads": {"uniform": [8, 16]}}
    few = sound({"random": {**axes, "samples": 50, "seed": 3}})
    more = sound({"random": {"variant": {"choice": VARIANTS}, **axes, "samples": 300, "seed": 3}})
    for one, other in zip(few, more, strict=False):
        assert all(other.fields[name] == value for name, value in one.fields.items())
    rates: list[Any] = [point.fields["optimizer.lr"] for point in more]
    heads = {point.fields["model.num_heads"] for point in more}
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    below = sum(rate < 1e-3 for rate in rates) / 300  # half of the range's logarithm
    assert abs(below - 0.5) < 4 * math.sqrt(0.25 / 300)
    assert heads == set(range(8, 17))
    assert all(type(number) is int for number in heads)
    assert {point.labels["variant"] for point in more} == {"mha", "gqa"}
    assert len({point.named for point in more}) == 300
    assert sound({"random": {**axes, "samples": 50, "seed": 4}}) != few


@pytest.mark.parametrize(
    ("part", "key", "words"),
    [
        ({}, "parts.p", "needs grid, list or random"),
        ({"grid": {"variant": ["mha"]}}, "parts.p.grid.variant", "labelled sets of fields"),
        ({"grid": {"optimizer.lr": 1e-3}}, "parts.p.grid.optimizer.lr", "list of values"),
        ({"grid": {"optimizer.lr": [1, 1]}}, "parts.p.grid.optimizer.lr", "is there 2 times"),
        ({"grid": {"variant": VARIANTS, "model.attention": ["mha"]}}, "parts.p.grid", "is set by 2 axes"),
        ({"grid": {"run.folder": ["a"]}}, "parts.p.grid.run.folder", "the sweep chooses it"),
        ({"grid": {"variant": {"mha": {"attention": "mha"}}}}, "parts.p.grid.variant.mha", "write section.field"),
        ({"grid": {f"run.{letter}": list(range(30)) for letter in "abcd"}}, "parts.p.grid", "more than 100,000 children"),
        ({"list": [{"label": "a", "run.seed": 0}, {"label": "a", "run.seed": 1}]}, "parts.p.list", "names 2 entries"),
        ({"list": [{"run.seed": 0}], "grid": {"run.seed": [1]}}, "parts.p", "is set twice"),
        ({"random": {"run.x": {"log_uniform": [0, 1]}, "samples": 1}}, "parts.p.random.run.x.log_uniform", "above 0"),
        ({"random": {"optimizer.lr": {"normal": [0, 1]}, "samples": 1}}, "parts.p.random.optimizer.lr", "must be {choice: …}"),
        ({"random": {"optimizer.lr": {"choice": [1]}}}, "parts.p.random.samples", "whole number"),
    ],
)
def test_faults_name_the_key_and_say_what_to_write(part: dict[str, Any], key: str, words: str) -> None:
    faults: list[Fault] = []
    assert points(part, "parts.p", faults) == []
    assert [fault.key for fault in faults] == [key]
    assert words in faults[0].allowed
