"""The note by which a pipeline keeps its stages when it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue

from configs.errors import UserError
from configs.load import load_config
from pretrain.checkpoints.folder import TrainState
from pretrain.checkpoints.stages import stage_note, stored_weights
from pretrain.checkpoints.state import State
from pretrain.checkpoints.store import CheckpointStore
from tests.helpers import write_run


def write(folder: Path, note: dict[str, JsonValue]) -> Path:
    """A checkpoint of a state with this note."""
    config = load_config(write_run(folder, folder / "data")).resolved(300)
    return CheckpointStore(folder).save_alone(config, TrainState(1, 2, "d" * 64), "{}", State([], {}, note))


def test_stages_are_kept_where_there_are_as_many(tmp_path: Path) -> None:
    folder = write(tmp_path, stage_note(2, [5, 0, 7]))
    assert stored_weights(folder, stages=2, layers=3) == [5, 0, 7]
    assert stored_weights(folder, stages=3, layers=3) is None
    assert stored_weights(folder, stages=2, layers=4) is None


def test_another_engine_leaves_no_note(tmp_path: Path) -> None:
    assert stored_weights(write(tmp_path, {}), stages=2, layers=3) is None


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
    folder = write(tmp_path, {"stages": note})
    with pytest.raises(UserError, match=rf"state\.json: is damaged \({expected}"):
        stored_weights(folder, stages=2, layers=3)
