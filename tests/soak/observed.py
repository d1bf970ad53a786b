"""`launch/pretrain.py`, each of whose operations on files is counted, and one of which can be waited for.

Takes the command's place under every launcher. SOAK_ORDER names a JSON file: the folders of the run and of its data, where to
note operations, and the one to report. Whoever asked kills, or lets the operation go on by a second file.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
WAITS = 10.0  # seconds for which an operation waits for its end


class Observer:
    """An audit hook: Python calls it before each operation."""

    def __init__(self, order: dict[str, Any], rank: int) -> None:
        self.run, self.data, self.requested = order["run"], order["data"], order["requested"]
        wanted = order.get("wanted")
        self.wanted = (wanted["phase"], wanted["count"]) if wanted and wanted["rank"] == rank else None
        self.waits = bool(wanted and wanted["waits"])
        self.notes = os.open(f"{order['notes']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.counts: Counter[str] = Counter()
        self.busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (event != "open" and event not in CHANGES) or self.busy:
            return
        path = path_of(event, arguments)
        if (phase := phase_of(path, event, arguments, self.run, self.data)) is None:
            return
        self.busy = True
        try:
            self.counts[phase] += 1
            os.write(self.notes, f"{phase} {event} {path}\n".encode())
            if (phase, self.counts[phase]) == self.wanted:
                os.close(os.open(self.requested, os.O_WRONLY | os.O_CREAT, 0o600))
                until = time.monotonic() + WAITS
                while self.waits and time.monotonic() < until and not os.path.exists(f"{self.requested}.done"):
                    time.sleep(0.001)
        finally:
            self.busy = False


def path_of(event: str, arguments: tuple[Any, ...]) -> str:
    """The path that an operation names first; what is left of it if it names none."""
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return ""
    name = os.fsdecode(path)
    folder = arguments[1] if event in ("os.remove", "os.rmdir", "shutil.rmtree") and len(arguments) > 1 else None
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(name):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
    return name


def phase_of(path: str, event: str, arguments: tuple[Any, ...], run: str, data: str) -> str | None:
    """What a run is at when it does this to a file: save, commit, resume, figures or index; None: nothing that counts."""
    changes = event != "open" or _writes(arguments)
    if path.startswith(f"{data}/index"):
        return "index" if changes else None
    if not path.startswith(f"{run}/"):
        return None
    folder, _, rest = path.removeprefix(f"{run}/").partition("/")
    if folder != "checkpoints":
        return "figures" if changes else None
    if rest.startswith(".step_") and ".partial" in rest:
        return "commit" if event == "os.rename" and rest.endswith(".partial") else "save"
    if not changes:
        return "resume" if rest.startswith("step_") else None
    return "commit"


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or (isinstance(mode, str) and any(letter in mode for letter in "wax+"))


def main() -> None:
    order = json.loads(Path(os.environ["SOAK_ORDER"]).read_text())
    sys.addaudithook(Observer(order, int(os.environ.get("RANK", "0"))))
    sys.argv[0] = str(ROOT / "launch" / "pretrain.py")
    sys.path[0] = str(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
