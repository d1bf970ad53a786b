"""What a soak draws: everything that the schema has, anything that the validation accepts, and the same again for a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.load import load_config
from launch.common import CHECKS
from tests.helpers import write_run
from tests.soak import draw
from tests.soak.draw import LEFT_ALONE, OF_LAYOUT, VALUES, Pair, all_fields, choices, drawn_fields, faults, overrides, pair


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [pair(3, number) for number in range(1, 31)]


def test_every_field_is_drawn_or_left_alone_for_a_reason() -> None:
    known = set(all_fields())
    assert "backend" in known
    assert len(known) > 80
    assert known.issuperset((*LEFT_ALONE, *VALUES, *OF_LAYOUT))
    assert all(len(choices(name)) > 1 or name in ("model.kind", "optimizer.kind") for name in drawn_fields())


def test_a_new_field_must_be_given_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(VALUES, "model.hidden_size")
    with pytest.raises(KeyError, match=r"model\.hidden_size: give it values"):
        choices("model.hidden_size")


def test_a_case_follows_from_seed_and_number(pairs: list[Pair]) -> None:
    assert pair(3, 9) == pairs[8]
    assert pair(4, 9) not in pairs
    assert len({str(case) for case in pairs}) > 25


def test_commands_accept_what_is_drawn(tmp_path: Path, prepared: Path, pairs: list[Pair]) -> None:
    config = write_run(tmp_path, prepared)
    for case in pairs[:6]:
        for layout in (case.source, case.target):
            settings = [*overrides(case.common), *overrides(layout.values), f"--training.steps={draw.STEPS}"]
            settings += ["--checkpoint.every_steps=4"]
            loaded = load_config(config, settings, CHECKS, layout.processes)
            assert loaded.model.hidden_size == case.common["model.hidden_size"]


def values_of(cases: Sequence[Pair], name: str) -> set[str]:
    """As text: a pattern of variants is a list."""
    return {str({**case.common, **layout.values}[name]) for case in cases for layout in (case.source, case.target)}


def test_layouts_of_all_kinds_come_up(pairs: list[Pair]) -> None:
    for name in ("backend", "model.position", "parallel.zero_stage", "parallel.tensor"):
        assert values_of(pairs, name) == {str(value) for value in VALUES.get(name, choices(name))}, name
    assert len(values_of(pairs, "model.attention")) > 8  # of more than these cases can hold
    assert values_of(pairs, "parallel.pipeline") >= {"1", "2"}
    assert {layout.processes for case in pairs for layout in (case.source, case.target)} == {1, 2, 4}
    assert 0 < sum(case.same for case in pairs) < len(pairs) / 2
    for case in pairs:
        assert ("model.dropout" in case.common) == case.same  # another layout would draw other masks
        if case.common["gha.stage"] == "constrain":
            assert len(values_of([case], "training.micro_batch_size")) == 1


def test_what_the_validation_refuses_is_a_fault(pairs: list[Pair]) -> None:
    assert not faults(pairs[0].common, 1)
    refused = {**pairs[0].common, "model.attention": "gqa", "model.num_kv_heads": None}
    assert [fault.key for fault in faults(refused, 1) if "num_kv_heads" in fault.key] == ["model.num_kv_heads"]
