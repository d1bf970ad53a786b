"""Reading `<run>/metrics.jsonl`: one JSON object per line, each with the step that it is of. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.errors import UserError

METRICS = "metrics.jsonl"  # in a run's folder


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, in order; none if it has written none yet. UserError for a file of anything else.

    A killed run can leave half a line at the end, which is left out.
    """
    path = folder / METRICS
    try:
        *complete, last = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):  # what stands in the folder's place is another error
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    lines = [_parsed(line) for line in complete]
    if None in lines:
        number = lines.index(None) + 1
        raise UserError(f"{path}: is damaged (line {number} is no JSON object with a step); mend it or move it away")
    return [line for line in (*lines, _parsed(last)) if line is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
