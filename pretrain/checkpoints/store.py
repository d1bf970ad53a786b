"""The checkpoints of a run: each written completely or not at all, verified before it is read, the old ones cleared away.

    <run>/checkpoints/latest              the name of the newest complete checkpoint, for people and scripts
                      step_00000100/…     pretrain/checkpoints/folder.py

A checkpoint grows in `.step_….partial` and gets its name, by an atomic rename, once its marker is on disk.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from configs.durable import sync, write_text
from configs.errors import UserError
from configs.load import to_yaml
from configs.schema import CheckpointConfig, Config
from data_pipeline.read.manifest import TOKENIZER, FileRecord, file_record
from pretrain.checkpoints.files import Holding, Index, Reader, make_index, write_index, write_parts
from pretrain.checkpoints.fit import check_fit, same_layout
from pretrain.checkpoints.folder import (
    CHECKPOINTS,
    COMMON_FILES,
    CONFIG,
    ENGINE_FOLDER,
    MARKER,
    STATE,
    Marker,
    TrainState,
    complete_steps,
    read_marker,
    read_state,
    step_folder,
    verify,
    vouched,
)
from pretrain.checkpoints.generators import GENERATORS, generators_file, restore_generators, write_generators
from pretrain.checkpoints.state import State
from pretrain.distributed.collectives import barrier, gather_objects, together
from pretrain.distributed.layout import Layout

LoadEngine = Callable[[Callable[[State], None]], None]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_folder: Path, layout: Layout) -> None:
        self.folder = run_folder / CHECKPOINTS
        self.layout = layout

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return complete_steps(self.folder)

    def path(self, step: int) -> Path:
        return step_folder(self.folder, step)

    def newest(self) -> Path | None:
        """The complete checkpoint of the highest step; None if there is none."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(
        self,
        config: Config,
        train: TrainState,
        tokenizer: str,
        state: State,
        write_more: Callable[[Path], list[Path]] = lambda folder: [],
    ) -> Path:
        """Write one checkpoint; every rank calls it with its part of the state.

        `write_more` writes other files and lists them; all ranks call it, once all have written their parts. Raises UserError
        on every rank when any rank could not write; the folder's complete checkpoints are then as they were.
        """
        final = self.path(train.step)
        partial = self._partial(train.step)
        files: dict[str, FileRecord] = {}
        indices: list[Index] = []

        def record(written: list[Path]) -> None:
            for path in written:
                files[str(path.relative_to(partial))] = file_record(path)

        def finish() -> None:
            self._finish(partial, final, indices[0], {name: record for part in records for name, record in part.items()})

        try:
            together(lambda: _make_partial(partial, config, train, tokenizer), main_only=True)
            holdings = gather_objects(Holding.of(state))
            together(lambda: indices.append(make_index(holdings)), main_only=True)
            together(lambda: record(self._write_own(partial, state)))
            together(lambda: record(write_more(partial)))
            records = gather_objects(files)
            together(finish, main_only=True)
        except UserError as error:
            if self.layout.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise self._not_saved(final, error) from None
        return final

    def save_alone(self, config: Config, train: TrainState, tokenizer: str, state: State) -> Path:
        """`save` by one process that holds everything, whatever process group it is in; without random generators."""
        final, partial = self.path(train.step), self._partial(train.step)
        try:
            _make_partial(partial, config, train, tokenizer)
            index = make_index([Holding.of(state)])
            written = write_parts(partial / ENGINE_FOLDER, 0, state)
            self._finish(partial, final, index, {str(path.relative_to(partial)): file_record(path) for path in written})
        except (OSError, UserError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._not_saved(final, error) from None
        return final

    def _partial(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.partial"

    def _not_saved(self, final: Path, error: Exception) -> UserError:
        newest = self.newest()
        kept = f"{newest} is still complete" if newest else "there is no earlier one"
        return UserError(f"{final}: the checkpoint could not be saved ({error}); {kept}")

    def _write_own(self, partial: Path, state: State) -> list[Path]:
        """Write this rank's parts and generators; the files."""
        generators = partial / generators_file(self.layout.rank)
        write_generators(generators, self.layout.device)
        return [generators, *write_parts(partial / ENGINE_FOLDER, self.layout.rank, state)]

    def _finish(self, partial: Path, final: Path, index: Index, files: dict[str, FileRecord]) -> None:
        common = [*(partial / name for name in COMMON_FILES), write_index(partial / ENGINE_FOLDER, index)]
        files = {**{str(path.relative_to(partial)): file_record(path) for path in common}, **files}
        write_text(partial / MARKER, json.dumps(asdict(Marker("manyheads-checkpoint-1", files)), indent=1))
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
        sync(self.folder)
        write_text(self.folder / "latest", final.name + "\n")
        shutil.rmtree(replaced, ignore_errors=True)

    def recover(self) -> None:
        """Put back a checkpoint that a process had moved aside to replace it, and ended; the main rank does, before a run."""
        if not self.layout.is_main:
            return
        for replaced in self.folder.glob(".step_*.replaced"):
            final = self.folder / replaced.name.removeprefix(".").removesuffix(".replaced")
            if (replaced / MARKER).exists() and not final.exists():
                replaced.rename(final)

    def clear_old(self, policy: CheckpointConfig) -> None:
        """Keep the last `keep_last` and every checkpoint whose step is a multiple of `keep_every`; the main rank deletes."""
        if not self.layout.is_main:
            return
        for step in self.steps()[: -policy.keep_last]:
            if policy.keep_every is None or step % policy.keep_every:
                doomed = self.path(step)
                try:
                    (doomed / MARKER).unlink()  # first of all: half a deleted checkpoint is no checkpoint
                    shutil.rmtree(doomed)
                except OSError as error:
                    print(f"warning: {doomed}: cannot be deleted ({error.strerror})", file=sys.stderr, flush=True)

    def clear_remains(self) -> None:
        """Delete what killed processes left: partial checkpoints and half-deleted ones; the main rank deletes, before a run."""
        if self.layout.is_main:
            half_deleted = (path for path in self.folder.glob("step_*") if not (path / MARKER).exists())
            for path in (*self.folder.glob(".step_*"), *half_deleted):
                shutil.rmtree(path, ignore_errors=True)

    def find(self, resume: str) -> Path | None:
        """The folder that `--resume` names: `auto` is this run's newest checkpoint, None if it has none yet.

        UserError when this run's folder already has later checkpoints than that: they would be mixed with the new ones.
        """
        if resume == "auto":
            return self.newest()
        folder = newest_checkpoint(Path(resume))
        step = read_state(folder).step
        later = [other for other in self.steps() if other > step]
        if later:
            raise UserError(
                f"{self.folder}: holds checkpoints of later steps ({', '.join(map(str, later))}) than {folder}; "
                "choose another --run.folder"
            )
        return folder

    def check(self, folder: Path, config: Config, data_sha256: str, tokenizer: str) -> TrainState:
        """That `folder` fits this run and is undamaged; every rank calls it and verifies its share of the files.

        UserError on every rank when one finds a fault.
        """
        found: list[tuple[TrainState, list[str]]] = []

        def read() -> None:
            state, marker = read_state(folder), read_marker(folder)
            check_fit(folder, state, config, data_sha256, tokenizer)
            parts = [path for path in (folder / ENGINE_FOLDER).rglob("*") if path.is_file()]
            vouched(folder, marker, [str(path.relative_to(folder)) for path in parts])
            found.append((state, sorted(marker.files)))

        self._verify(folder, COMMON_FILES)
        together(read)
        state, names = found[0]
        self._verify(folder, names[self.layout.rank :: self.layout.world_size])
        return state

    def _verify(self, folder: Path, names: Sequence[str]) -> None:
        """`verify` of this rank's names; the error of any rank says from where the run could resume instead."""
        try:
            together(lambda: verify(folder, names))
        except UserError as error:
            earlier = [step for step in self.steps() if self.path(step) != folder]
            hint = f"; delete it, and --resume=auto resumes from step {earlier[-1]}" if earlier else ""
            raise UserError(f"{error}{hint}") from None

    def restore(self, folder: Path, config: Config, train: TrainState, load_engine: LoadEngine) -> None:
        """Load engine and generators of a checked folder; every rank calls it. UserError on every rank when one fails.

        `load_engine` is given what fills a state's tensors. Generators stay as they are on another layout than that of the
        checkpoint, or where it has none.
        """
        readers: list[Reader] = []
        together(lambda: readers.append(Reader(folder / ENGINE_FOLDER)))
        load_engine(lambda state: together(lambda: readers[0].load(state)))

        def restore_own() -> None:
            written = any(name.startswith(GENERATORS) for name in read_marker(folder).files)
            if written and same_layout(folder, train, config, self.layout.world_size):
                restore_generators(folder / generators_file(self.layout.rank), self.layout.device)

        together(restore_own)
        barrier()


def newest_checkpoint(path: Path) -> Path:
    """`path` itself, or, if it is a run's folder, the newest checkpoint in it. UserError when that has none."""
    if not (path / CHECKPOINTS).is_dir():
        if (path / "metrics.jsonl").exists():
            raise UserError(f"{path}: a run that has no checkpoint yet")
        return path
    newest = CheckpointStore(path, Layout.from_environment()).newest()
    if newest is None:
        raise UserError(f"{path}: holds no complete checkpoint")
    return newest


def _make_partial(partial: Path, config: Config, train: TrainState, tokenizer: str) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / ENGINE_FOLDER).mkdir(parents=True)
    write_text(partial / CONFIG, to_yaml(config))
    write_text(partial / STATE, json.dumps(asdict(train)))
    write_text(partial / TOKENIZER, tokenizer)
