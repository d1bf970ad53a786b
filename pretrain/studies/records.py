"""The files of a child beside those of its run: child.json, what it is, and outcome.json, how it ended. Torch-free.

<study>/<part>/<child>/child.json      written before it starts
                       outcome.json    written when it has ended
                       output.log      what it printed, of all attempts
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from configs.durable import sync, write_text
from configs.errors import UserError

CHILD, OUTCOME, LOG = "child.json", "outcome.json", "output.log"
ATTEMPT = "attempt "  # begins a line of the log at each start of the child
Status = Literal["finished", "failed", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `seconds` are those of all attempts that ended while the sweep ran."""

    status: Status
    error: str | None
    seconds: float
    started: str
    ended: str
    attempts: int


def now() -> str:
    """The time as text, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_outcome(folder: Path) -> Outcome | None:
    """How the child ended, or None. UserError for a damaged file."""
    tree = _read(folder / OUTCOME)
    try:
        return None if tree is None else Outcome(**tree)
    except TypeError as error:
        raise UserError(f"{folder / OUTCOME}: is damaged ({error}); delete it, and the child resumes") from error


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Raises OSError."""
    _write(folder / OUTCOME, asdict(outcome))


def check_definition(folder: Path, definition: Mapping[str, Any]) -> None:
    """UserError if the folder holds another child."""
    before = _read(folder / CHILD)
    if before is None:
        return
    changed = [key for key in {**before, **definition} if before.get(key) != definition.get(key)]
    if changed:
        was, now = (json.dumps(_differing(one, other)) for one, other in ((before, definition), (definition, before)))
        raise UserError(
            f"{folder}: was started with {was}, and the study has {now}; put the study back, give the part another name, "
            "or delete the folder"
        )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What of `one` is not so in `other`."""
    found: dict[str, Any] = {}
    for key, mine in one.items():
        theirs = other.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict) and mine != theirs:
            found[key] = _differing(mine, theirs)
        elif mine != theirs or key not in other:
            found[key] = mine
    return found


def write_definition(folder: Path, definition: Mapping[str, Any]) -> None:
    """Raises OSError."""
    if not (folder / CHILD).exists():
        _write(folder / CHILD, definition)


def attempts(folder: Path) -> int:
    """How often the child was started."""
    try:
        with (folder / LOG).open(encoding="utf-8", errors="replace") as log:
            return sum(line.startswith(ATTEMPT) for line in log)
    except OSError:
        return 0


def _read(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is damaged (no JSON); delete it") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is damaged (no JSON object); delete it")
    return tree


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(tree, indent=2) + "\n")
    sync(path.parent)
