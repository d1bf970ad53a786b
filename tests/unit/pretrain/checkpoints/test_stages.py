"""The note by which a pipeline keeps its stages when it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue

from configs.errors import UserError
from pretrain.checkpoints.files import Holding, make_index, write_index
from pretrain.checkpoints.stages import stage_note, stored_weights
from pretrain.checkpoints.state import State


def write(engine: Path, *notes: dict[str, JsonValue]) -> None:
    """The index of a state of so many ranks."""
    write_index(engine, make_index([Holding.of(State([], {}, note)) for note in notes]))


def test_stages_are_kept_where_there_are_as_many(tmp_path: Path) -> None:
    note = stage_note(2, [5, 0, 7])
    write(tmp_path, note, note)
    assert stored_weights(tmp_path, stages=2, layers=3) == [5, 0, 7]
    assert stored_weights(tmp_path, stages=3, layers=3) is None
    assert stored_weights(tmp_path, stages=2, layers=4) is None


def test_another_engine_leaves_no_note(tmp_path: Path) -> None:
    write(tmp_path, {})
    assert stored_weights(tmp_path, stages=2, layers=3) is None


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        ([1, 2], r"notes\.stages: "),
        ({"count": 2}, r"notes\.stages\.weights: "),
        ({"count": 0, "weights": [1]}, r"notes\.stages\.count: "),
        ({"count": 2, "weights": [1.5]}, r"notes\.stages\.weights\.0: "),
        ({"count": 2, "weights": [-1]}, r"notes\.stages\.weights\.0: "),
    ],
)
def test_a_damaged_note(tmp_path: Path, note: JsonValue, expected: str) -> None:
    write(tmp_path, {"stages": note})
    with pytest.raises(UserError, match=rf"index\.json: is damaged \({expected}"):
        stored_weights(tmp_path, stages=2, layers=3)
