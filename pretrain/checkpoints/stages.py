"""How a checkpoint's pipeline stages share out the layers of the model. Needs no engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from configs.durable import write_text
from configs.errors import UserError

WEIGHTS_FILE = "layer_weights.json"


def write_weights(engine: Path, weights: Sequence[int]) -> Path:
    """Keep the weights by which the stages are balanced, one for each layer; the file."""
    path = engine / WEIGHTS_FILE
    write_text(path, json.dumps(list(weights)))
    return path


def read_weights(engine: Path, layers: int) -> list[int]:
    """The weights by which a checkpoint's stages are balanced, one for each of `layers` layers."""
    path = engine / WEIGHTS_FILE
    try:
        weights = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(weights, list) or len(weights) != layers or any(type(weight) is not int for weight in weights):
        raise UserError(f"{path}: must hold the weights of {layers} layers, whole numbers")
    return weights
