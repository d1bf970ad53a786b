"""Where a running child stands, from the end of its metrics. Torch-free."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pretrain.report.records import METRICS

TAIL = 2**16  # bytes
PRUNED = "pruned"  # the run of a schedule's last stage, in the folder of its first (pretrain/grouping/origin.py)


@dataclass(frozen=True)
class Standing:
    """A child's last step with its figures; step 0 before the first."""

    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None


def standing(folder: Path) -> Standing:
    """Of the run in a folder, or of its last stage."""
    return _of(folder / PRUNED) or _of(folder) or Standing()


def _of(folder: Path) -> Standing | None:
    """What the last line of a step says; None if there is none."""
    try:
        with (folder / METRICS).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
            if "tokens_per_second" in entry:
                return Standing(int(entry["step"]), entry.get("loss"), float(entry["tokens_per_second"]))
        except (ValueError, KeyError, TypeError):
            continue  # half a line
    return None
