"""The checkpoints of a run as folders: found, put in place, moved aside, the old ones deleted. One process does it, rank 0.

    <run>/checkpoints/latest              the name of the newest complete checkpoint, for people and scripts
                      step_00000100/…     pretrain/checkpoints/folder.py
                      step_00000200.aside one that the run does not use any more: damaged, or later than where it resumed

A checkpoint grows in `.step_….ATTEMPT.partial` and gets its name, by an atomic rename, once its marker is on disk. Each attempt
at a run has its own name there: a process that outlives an earlier attempt writes into no checkpoint of this one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

from configs.durable import sync, write_text
from configs.errors import UserError
from configs.load import to_yaml
from configs.schema import CheckpointConfig, Config
from data_pipeline.read.manifest import TOKENIZER, FileRecord, file_record
from pretrain.checkpoints.files import holding, make_index, write_parts
from pretrain.checkpoints.folder import (
    CHECKPOINTS,
    COMMON_FILES,
    CONFIG,
    ENGINE_FOLDER,
    MARKER,
    STATE,
    Marker,
    TrainState,
    all_steps,
    complete_steps,
    step_folder,
)
from pretrain.checkpoints.index import INDEX, Index, index_text
from pretrain.checkpoints.state import State


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_folder: Path, attempt: str = "one_process") -> None:
        self.run_folder, self.attempt = run_folder, attempt
        self.folder = run_folder / CHECKPOINTS

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return complete_steps(self.folder)

    def path(self, step: int) -> Path:
        return step_folder(self.folder, step)

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step; None if there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def partial(self, step: int) -> Path:
        """Where a checkpoint of `step` grows."""
        return self.folder / f".{self.path(step).name}.{self.attempt}.partial"

    def make_partial(self, step: int) -> Path:
        """That folder, empty. Raises OSError."""
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / ENGINE_FOLDER).mkdir(parents=True)
        return partial

    def discard(self, step: int) -> None:
        """Delete what a save that failed has left."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def not_saved(self, step: int, error: Exception) -> UserError:
        """The error of a checkpoint that could not be written."""
        try:
            newest = self.newest()
            kept = f"{newest} is still complete" if newest else "there is no earlier one"
        except OSError as fault:  # of the same file system
            kept = f"{self.folder} cannot be listed ({fault.strerror})"
        return UserError(f"{self.path(step)}: the checkpoint could not be saved ({error}); {kept}")

    def put_in_place(self, step: int, files: Mapping[str, FileRecord]) -> Path:
        """Give a partial checkpoint that consists of `files` its marker and its name; the folder. Raises OSError."""
        partial, final = self.partial(step), self.path(step)
        assert files.keys() >= {*COMMON_FILES, f"{ENGINE_FOLDER}/{INDEX}"}
        write_text(partial / MARKER, json.dumps(asdict(Marker("manyheads-checkpoint-1", dict(files))), indent=1))
        for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
            sync(folder)
        replaced = self.folder / f".{final.name}.replaced"  # the same step saved before
        if final.exists():
            final.rename(replaced)
        try:
            partial.rename(final)
        except OSError:
            self.recover()
            raise
        try:  # the checkpoint is complete now, whatever else fails
            sync(self.folder)
            write_text(self.folder / "latest", final.name + "\n")
        except OSError as error:
            print(f"warning: {self.folder / 'latest'}: cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def save_alone(self, config: Config, train: TrainState, tokenizer: str, state: State) -> Path:
        """Save a checkpoint from one process that holds everything, without random generators. UserError if it cannot be."""
        try:
            partial = self.make_partial(train.step)
            _, record = write_parts(partial / ENGINE_FOLDER, 0, state.parts, {})
            files = {f"{ENGINE_FOLDER}/rank_00000.safetensors": record}
            files |= write_common(partial, config, tokenizer, make_index([holding(state)]))
            files |= write_state(partial, replace(train, scalars=state.scalar_values(), notes=dict(state.notes)))
            return self.put_in_place(train.step, files)
        except (OSError, UserError) as error:
            self.discard(train.step)
            raise self.not_saved(train.step, error) from None

    def recover(self) -> None:
        """Put back a checkpoint that a process had moved out of the way to replace it, and ended."""
        for replaced in self.folder.glob(".step_*.replaced"):
            final = self.folder / replaced.name.removeprefix(".").removesuffix(".replaced")
            if (replaced / MARKER).exists() and not final.exists():
                replaced.rename(final)

    def move_aside(self, step: int) -> Path:
        """Rename the checkpoint of `step`, so that no run finds it; where it is now. UserError if that is impossible."""
        folder = self.path(step)
        names = (folder.with_name(f"{folder.name}.aside{'' if number == 1 else f'-{number}'}") for number in count(1))
        aside = next(name for name in names if not name.exists())
        try:
            folder.rename(aside)
        except OSError as error:
            raise UserError(f"{folder}: cannot be moved aside ({error.strerror})") from error
        return aside

    def point_to_newest(self) -> None:
        """Let `latest` name the newest complete checkpoint. Raises OSError."""
        newest = self.newest()
        if newest is not None:
            write_text(self.folder / "latest", newest.name + "\n")

    def take_old(self, policy: CheckpointConfig) -> list[Path]:
        """Rename all checkpoints but the last `keep_last` and those of multiples of `keep_every`; the folders to delete."""
        doomed = []
        for step in self.steps()[: -policy.keep_last]:
            if policy.keep_every is None or step % policy.keep_every:
                folder = self.path(step)
                try:
                    # First of all, so that half a deleted checkpoint is no checkpoint.
                    doomed.append(folder.rename(self.folder / f".{folder.name}.deleted"))
                except OSError as error:
                    print(f"warning: {folder}: cannot be deleted ({error.strerror})", file=sys.stderr, flush=True)
        return doomed

    def clear_remains(self) -> None:
        """Finish what killed processes began: delete partial and half-deleted checkpoints, let `latest` name the newest."""
        for end in ("partial", "replaced", "deleted"):  # not what a copy in progress writes here
            for path in self.folder.glob(f".step_*.{end}"):
                shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # a full disk is an error of the next save
            self.point_to_newest()

    def damaged(self) -> list[int]:
        """Steps of folders that are named like checkpoints but have no marker."""
        complete = set(self.steps())
        return [step for step in all_steps(self.folder) if step not in complete]


def write_common(partial: Path, config: Config, tokenizer: str, index: Index) -> dict[str, FileRecord]:
    """Write what one rank writes for all, but for `write_state`; the files' records. Raises OSError."""
    return _write(partial, {CONFIG: to_yaml(config), TOKENIZER: tokenizer, f"{ENGINE_FOLDER}/{INDEX}": index_text(index)})


def write_state(partial: Path, train: TrainState) -> dict[str, FileRecord]:
    """Write state.json; its record. Raises OSError."""
    return _write(partial, {STATE: json.dumps(asdict(train))})


def _write(partial: Path, texts: Mapping[str, str]) -> dict[str, FileRecord]:
    for name, text in texts.items():
        write_text(partial / name, text)
    return {name: file_record(partial / name) for name in texts}
