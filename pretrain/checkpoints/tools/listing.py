"""The checkpoints of a run, or of any folder, in a table: what they are and whether they are complete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime

from configs.errors import UserError
from configs.schema import Config
from configs.words import counted
from pretrain.checkpoints.folder import (
    CHECKPOINTS,
    CONFIG,
    MARKER,
    DamagedError,
    Marker,
    TrainState,
    read_config,
    read_marker,
    read_state,
)
from pretrain.checkpoints.storage import Place, modified, sizes
from pretrain.checkpoints.tools.words import size_words, table
from pretrain.engines import layout_words

_NAMES = {
    ".aside": "aside: its run does not use it",
    ".partial": "partial: it is being written, or what wrote it was killed",
    ".replaced": "partial: it is being replaced, or what replaced it was killed",
    ".deleted": "partial: it is being deleted, or what deleted it was killed",
}


@dataclass(frozen=True)
class Listed:
    """A row of the table."""

    name: str
    status: str  # "complete", or why it is not
    bytes: int
    step: int | None = None
    layout: str = ""
    written: datetime | None = None

    @property
    def cells(self) -> list[str]:
        step = "?" if self.step is None else f"{self.step:,}"
        written = "?" if self.written is None else f"{self.written.astimezone():%Y-%m-%d %H:%M}"
        return [self.name, step, size_words(self.bytes), written, self.layout or "?", self.status]


def listing(path: Place) -> str:
    """A table of all checkpoints in a run's folder, or in any other, or of the checkpoint `path` itself. UserError for none."""
    rows = [row.cells for row in list_checkpoints(path)]
    if not rows:
        raise UserError(f"{path}: holds no checkpoints")
    return table(["checkpoint", "step", "size", "written", "layout", "state"], rows, right="step size")


def list_checkpoints(path: Place) -> list[Listed]:
    """The rows of `listing`, by their steps. UserError if there is no such folder."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    configs: dict[str, Config] = {}  # by their hashes: those of a run are mostly the same
    if (path / MARKER).exists():
        return [_listed(path, configs)]
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    latest = (folder / "latest").read_text(encoding="utf-8").strip() if (folder / "latest").is_file() else None
    rows = [_listed(found, configs) for found in _folders(folder)]
    rows = [replace(row, status="complete, latest") if (row.name, row.status) == (latest, "complete") else row for row in rows]
    return sorted(rows, key=lambda row: (row.name.lstrip(".").partition(".")[0], row.name))


def _folders(folder: Place) -> Iterator[Place]:
    """What is or was a checkpoint."""
    for found in folder.glob("*"):
        if found.is_dir() and (found.name.startswith(("step_", ".step_")) or (found / MARKER).exists()):
            yield found


def _listed(folder: Place, configs: dict[str, Config]) -> Listed:
    found = sizes(folder)
    status = next((words for part, words in _NAMES.items() if part in folder.name), None)
    row = Listed(folder.name or str(folder), status or f"not complete: it has no {MARKER}", sum(found.values()))
    if MARKER not in found:
        return row
    try:
        marker = read_marker(folder)
        row = replace(row, written=modified(folder / MARKER), status=status or _complete(marker, found))
        state = read_state(folder)
        row = replace(row, step=state.step)
        sha256 = marker.files[CONFIG].sha256
        if sha256 not in configs:
            configs[sha256] = read_config(folder, state, checks=())
        return replace(row, layout=_layout(state, configs[sha256]))
    except (UserError, OSError) as error:  # OSError: it has been renamed or deleted meanwhile
        reason = " ".join(str(error).split()).removeprefix(f"{folder}/")  # the row names the folder
        return replace(row, status=f"damaged: {reason}" if isinstance(error, DamagedError) else f"unknown: {reason}")


def _layout(state: TrainState, config: Config) -> str:
    if state.merged:
        return f"weights only, an average of {len(state.merged)} checkpoints"
    ranks = counted(state.world_size, "rank")
    return f"{ranks}, {layout_words(config, state.world_size)}, {config.training.precision}"


def _complete(marker: Marker, found: dict[str, int]) -> str:
    missing = [name for name in marker.files if name not in found]
    if missing:
        return f"not complete: {_files(missing, 'is missing', 'are missing')}"
    others = [name for name, record in marker.files.items() if found[name] != record.bytes]
    if others:
        return f"damaged: {_files(others, 'has', 'have')} another size than was written"
    return "complete"


def _files(names: list[str], one: str, many: str) -> str:
    return f"{names[0]} {one}" if len(names) == 1 else f"{names[0]} and {counted(len(names) - 1, 'more file')} {many}"
