"""One checkpoint folder: what is in it, how it is verified and read.

<run>/checkpoints/step_00000100/config.yaml     resolved configuration
                                state.json      step, number of ranks, data, numbers of the optimizer
                                tokenizer.json  the tokenizer of the data
                                engine/...      model, optimizer, random generators (pretrain/checkpoints/files.py)
                                complete.json   size and SHA-256 of every file above, written last
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar, overload

from pydantic import FiniteFloat, JsonValue, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from configs.errors import UserError
from configs.load import Check, load_config
from configs.schema import Config
from data_pipeline.read.manifest import TOKENIZER, FileRecord, file_record
from model.faults import model_faults
from pretrain.checkpoints.storage import Place, RemotePath
from pretrain.engines import engine_faults
from pretrain.optim.registry import optimizer_faults

Content = TypeVar("Content")
CHECKPOINTS = "checkpoints"  # in a run's folder
MARKER, CONFIG, STATE, ENGINE_FOLDER = "complete.json", "config.yaml", "state.json", "engine"
COMMON_FILES = (
    CONFIG,
    STATE,
    TOKENIZER,
)  # these and its weights (pretrain/checkpoints/unsharded.py) are all that a model needs


@dataclass(frozen=True)
class MergedFrom:
    """One of the checkpoints whose weights were averaged."""

    checkpoint: str
    marker_sha256: str
    step: NonNegativeInt
    weight: FiniteFloat
    data: list[str] = field(default_factory=list)  # the folders it was trained on


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. All else (learning rate, data order) follows from `step` and the config."""

    step: NonNegativeInt
    world_size: PositiveInt
    data_sha256: str  # of the manifests of the sources, joined by commas; of a stream those of its files' names and sizes
    scalars: dict[str, FiniteFloat] = field(default_factory=dict)  # of the optimizer, such as its number of steps
    notes: dict[str, JsonValue] = field(default_factory=dict)  # what an engine wants to know when it is built again
    merged: list[MergedFrom] = field(default_factory=list)  # without an optimizer's state


@dataclass(frozen=True)
class Marker:
    """Content of complete.json."""

    format: Literal["manyheads-checkpoint-1"]
    files: dict[str, FileRecord]


class DamagedError(UserError):
    """A checkpoint is not what was written."""


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def step_folder(checkpoints: Path, step: int) -> Path:
    """The checkpoint of a step among those of a run."""
    return checkpoints / step_name(step)


def all_steps(checkpoints: Place) -> list[int]:
    """Steps of all checkpoints in a run's folder `checkpoints`, those that lost their marker among them, oldest first."""
    names = (path.name for path in checkpoints.glob("step_*") if path.is_dir())
    return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d{8,}", name))


def complete_steps(checkpoints: Place) -> list[int]:
    """Steps of all complete checkpoints in a run's folder `checkpoints`, oldest first."""
    return [step for step in all_steps(checkpoints) if (checkpoints / step_name(step) / MARKER).exists()]


@overload
def newest_checkpoint(path: Path) -> Path: ...
@overload
def newest_checkpoint(path: RemotePath) -> RemotePath: ...
def newest_checkpoint(path: Place) -> Place:
    """`path` itself, or, if it is a run's folder, its newest checkpoint. UserError if it has none, or that is incomplete."""
    if not (path / CHECKPOINTS).is_dir():
        if (path / "metrics.jsonl").exists():
            raise UserError(f"{path}: a run that has no checkpoint yet")
        return path
    steps = complete_steps(path / CHECKPOINTS)
    if not steps:
        raise UserError(f"{path}: holds no complete checkpoint")
    complete, last = path / CHECKPOINTS / step_name(steps[-1]), all_steps(path / CHECKPOINTS)[-1]
    if last > steps[-1]:
        newest = path / CHECKPOINTS / step_name(last)
        raise DamagedError(f"{newest}: not a complete checkpoint (no {MARKER}); name an earlier one, such as {complete}")
    return complete


def check_unused(checkpoints: Path) -> None:
    """UserError if a run that starts anew would mix its checkpoints with those of another."""
    if all_steps(checkpoints):
        raise occupied(checkpoints)


def occupied(checkpoints: Path) -> UserError:
    """What a run that starts anew says where another's checkpoints are."""
    return UserError(f"{checkpoints}: holds checkpoints already; pass --resume=auto, or another --run.folder, or delete it")


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """The named files, by default all of the marker, have the size and hash written there. DamagedError if not."""
    marker = read_marker(folder)
    names = list(marker.files if names is None else names)
    vouched(folder, marker, names)
    verify_files(folder, {name: marker.files[name] for name in names})


def verify_files(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """The files have these sizes and hashes; DamagedError names the first not to."""
    for name, expected in records.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path}: missing from the checkpoint")
        found = file_record(path)
        if found.bytes != expected.bytes:
            raise DamagedError(other_size(path, found.bytes, expected.bytes))
        if found != expected:
            raise DamagedError(f"{path}: its content is not what was written (corrupt)")


def other_size(path: Place, found: int, written: int) -> str:
    """What is wrong with a file of `found` bytes of which `written` were written."""
    truncated = " (truncated?)" if found < written else ""
    return f"{path}: has {found} bytes, {written} were written{truncated}"


def vouched(folder: Place, marker: Marker, names: Sequence[str]) -> None:
    """That the marker has records of these files."""
    missing = [name for name in names if name not in marker.files]
    if missing:
        raise DamagedError(f"{folder / MARKER}: does not vouch for {', '.join(missing)}")


def read_marker(folder: Place) -> Marker:
    """The marker of a complete checkpoint; UserError for any other folder."""
    return parse_marker(folder, marker_bytes(folder))


def marker_bytes(folder: Place) -> bytes:
    """What is in the marker's file. UserError if the folder has none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    if not (folder / MARKER).exists():
        raise DamagedError(f"{folder}: not a complete checkpoint of manyheads (no {MARKER})")
    return _content(folder / MARKER)


def parse_marker(folder: Place, content: bytes) -> Marker:
    """The marker of a checkpoint whose file of it has this content. UserError if that is none."""
    marker = parse_json(str(folder / MARKER), content, Marker)
    if not all(map(_inside, marker.files)):
        raise DamagedError(f"{folder / MARKER}: names files outside the checkpoint")
    vouched(folder, marker, COMMON_FILES)
    return marker


def _inside(name: str) -> bool:
    """Whether a name can be that of a file in a checkpoint, which the marker vouches for."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts
    return inside and str(path) == name and name not in (".", MARKER) and name.isprintable()


def read_state(folder: Place) -> TrainState:
    read_marker(folder)
    return read_json(folder / STATE, TrainState)


def read_config(
    folder: Place, state: TrainState | None = None, checks: Sequence[Check] = (model_faults, engine_faults, optimizer_faults)
) -> Config:
    """The resolved configuration a checkpoint was written with; `state` if it has been read already.

    UserError if this program cannot build its model; without `checks` it may need packages that are not installed.
    """
    return load_config(folder / CONFIG, checks=checks, world_size=(state or read_state(folder)).world_size)


def read_tokenizer(folder: Place) -> str:
    """The text of tokenizer.json."""
    try:
        return (folder / TOKENIZER).read_bytes().decode()
    except OSError as error:
        raise UserError(f"{folder / TOKENIZER}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DamagedError(f"{folder / TOKENIZER}: is damaged (it is not UTF-8 text)") from error


def read_json(path: Place, kind: type[Content]) -> Content:
    """A file of JSON that is just what the type says. UserError for any other."""
    return parse_json(str(path), _content(path), kind)


def _content(path: Place) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def parse_json(name: str, content: bytes, kind: type[Content]) -> Content:
    """The same of what has been read of a file."""
    try:
        found = TypeAdapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        raise DamagedError(f"{name}: is damaged ({where}{first['msg']})") from error
    try:
        json.loads(content, object_pairs_hook=_unique)
    except ValueError as error:
        raise DamagedError(f"{name}: is damaged ({error})") from error
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"{name!r} is there twice")
        names.add(name)
    return dict(pairs)
