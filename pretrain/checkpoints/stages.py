"""How a checkpoint's pipeline stages share out the layers of the model: a note in its state.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from configs.errors import UserError
from pretrain.checkpoints.folder import STATE, read_state

NOTE = "stages"


@dataclass(frozen=True)
class StageNote:
    """The number of stages, and the weight of each layer, by which they are balanced."""

    count: PositiveInt
    weights: list[NonNegativeInt]


def stage_note(stages: int, weights: Sequence[int]) -> dict[str, JsonValue]:
    """The notes of a state whose layers are balanced by `weights`."""
    return {NOTE: {"count": stages, "weights": list(weights)}}


def stored_weights(folder: Path, stages: int, layers: int) -> list[int] | None:
    """The weights by which a checkpoint's stages are balanced; None if it has another number of stages or layers."""
    notes = read_state(folder).notes
    if NOTE not in notes:
        return None
    try:
        note = TypeAdapter(StageNote).validate_json(json.dumps(notes[NOTE]), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("notes", NOTE, *first["loc"])))
        raise UserError(f"{folder / STATE}: is damaged ({place}: {first['msg']})") from error
    return note.weights if (note.count, len(note.weights)) == (stages, layers) else None
