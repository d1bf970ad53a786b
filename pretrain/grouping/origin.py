"""A note in the folder of a pruned run: the run whose heads were voted on, so that its report can say what became of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.durable import write_text
from pretrain.checkpoints.folder import read_json

ORIGIN, PRUNED = "pruned_from.json", "pruned"  # the note in a pruned run's folder; that folder in the other run's


@dataclass(frozen=True)
class Origin:
    """Content of the file."""

    run: str  # folder of the run, seen from that of the pruned one, so that both can be moved together
    step: int  # of the vote


def write_origin(pruned: Path, run: Path, step: int) -> None:
    """Raises OSError."""
    origin = Origin(os.path.relpath(run.resolve(), pruned.resolve()), step)
    write_text(pruned / ORIGIN, json.dumps(asdict(origin)) + "\n")


def read_origin(folder: Path) -> tuple[Path, int] | None:
    """The run from which `folder` was pruned and the step of its vote; None for a run that was not pruned."""
    if not (folder / ORIGIN).exists():
        return None
    origin = read_json(folder / ORIGIN, Origin)
    return Path(os.path.normpath(folder / origin.run)), origin.step
