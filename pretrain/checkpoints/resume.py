"""Where a run resumes: the checkpoint that `--resume` names, checked, and loaded into the engine of any layout.

The first rank reads what all must know and sends it to the others; each rank reads of the tensors only what it keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.durable import write_text
from configs.errors import UserError
from configs.launcher import restarts
from configs.schema import Config
from data_pipeline.read.manifest import FileRecord
from pretrain.checkpoints.files import Index, Reader, rank_file, read_index
from pretrain.checkpoints.fit import check_fit, same_layout
from pretrain.checkpoints.folder import (
    ENGINE_FOLDER,
    MARKER,
    DamagedError,
    TrainState,
    all_steps,
    newest_checkpoint,
    read_config,
    read_marker,
    read_state,
    step_folder,
    verify_files,
    vouched,
)
from pretrain.checkpoints.generators import restore_generators
from pretrain.checkpoints.state import State
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.collectives import broadcast_object, together
from pretrain.distributed.layout import Layout

Read = Callable[[State], None]  # fills a state; every rank calls it, and gets the UserError of any
LoadEngine = Callable[[Read], None]
Files = dict[str, FileRecord]
WENT_BACK = "went_back"  # in the folder of a run's checkpoints: `--resume=step:N`, once later ones are aside
STEP = "step:"  # --resume=step:N


@dataclass(frozen=True)
class Start:
    """A checkpoint that fits a run and is undamaged."""

    folder: Path
    config: Config  # that it was written with
    train: TrainState
    index: Index


@dataclass(frozen=True)
class Resumer:
    """What a checkpoint must fit: a run's resolved configuration and its data. Every rank calls each method."""

    store: CheckpointStore
    layout: Layout
    config: Config
    data_sha256: str  # of the sources' manifests
    tokenizer: str

    def find(self, resume: str) -> Start | None:
        """What `--resume` names; None if the run has no checkpoint yet and `resume` is "auto".

        "auto" is the newest checkpoint of this run that is undamaged; damaged ones are moved aside, with a warning. "step:N"
        is this run's checkpoint of step N, once: if torchrun or Slurm starts the command again, it is "auto". Anything else is
        a checkpoint's folder, or a run's folder for its newest. UserError if there is none, or it does not fit.
        """
        if resume == "auto" or (resume.startswith(STEP) and broadcast_object(self._went_back(resume))):
            return self._newest()
        folders: list[Path] = []
        together(lambda: folders.append(self._named(resume)), main_only=True)
        return self.check(broadcast_object(folders))

    def check(self, folders: list[Path]) -> Start:
        """That a folder, which the first rank names, fits and is undamaged; the ranks share out its files. UserError if not."""
        found: list[tuple[Start, Files]] = []
        together(lambda: found.append(self._read(folders[0])), main_only=True)
        start, files = broadcast_object(found[0] if found else None)
        # On the same layout the file that this rank will read.
        own = {name: files[name] for name in sorted(files)[self.layout.rank :: self.layout.world_size]}
        together(lambda: verify_files(start.folder, own))
        return start

    def reading(self, start: Start) -> Read:
        """What fills tensors and scalars of a state, whatever layout it is of, from a checkpoint."""
        reader = Reader(start.folder / ENGINE_FOLDER, start.index)

        def fill(state: State) -> None:
            reader.load(state)
            state.set_scalars(start.train.scalars)

        return lambda state: together(lambda: fill(state))

    def restore(self, start: Start, load_engine: LoadEngine) -> None:
        """Load engine and generators. UserError on every rank when one fails.

        Generators stay as they are on another layout than that of the checkpoint, or where it has none.
        """
        load_engine(self.reading(start))
        if same_layout(start.config, start.train, self.config, self.layout.world_size):
            file = start.folder / ENGINE_FOLDER / rank_file(self.layout.rank)
            together(lambda: restore_generators(file, self.layout.device))

    def leave_later(self, start: Start, resume: str) -> list[Path]:
        """Move the run's checkpoints of later steps aside; where they are now. The first rank calls it."""
        later = [step for step in all_steps(self.store.folder) if step > start.train.step]
        aside = [self.store.move_aside(step) for step in later]
        if aside:
            self.store.point_to_newest()
        if resume.startswith(STEP):
            write_text(self.store.folder / WENT_BACK, resume)
        return aside

    def _went_back(self, resume: str) -> bool:
        """Whether this command has gone back already, and a launcher has started it again: it must not lose what came after."""
        note = self.store.folder / WENT_BACK
        if not self.layout.is_main or not note.exists():
            return False
        if restarts() == 0:
            note.unlink()  # of an earlier command
            return False
        return note.read_text(encoding="utf-8") == resume

    def _newest(self) -> Start | None:
        steps: list[int] = broadcast_object(all_steps(self.store.folder))
        while steps:
            step = steps.pop()
            try:
                return self.check([self.store.path(step)])
            except DamagedError as error:
                if not steps:
                    raise UserError(
                        f"{error}; the run has no earlier checkpoint: delete {self.store.path(step)} to start anew"
                    ) from None
                self._leave(step, error)
        return None

    def _leave(self, step: int, error: DamagedError) -> None:
        """Move a damaged checkpoint aside, and say so."""

        def leave() -> None:
            aside = self.store.move_aside(step)
            print(f"warning: {error}; kept as {aside}, an earlier checkpoint takes its place", file=sys.stderr, flush=True)

        together(leave, main_only=True)

    def _named(self, resume: str) -> Path:
        if resume.startswith(STEP):
            folder = self.store.path(int(resume.removeprefix(STEP)))
            if not folder.is_dir():
                steps = ", ".join(map(str, self.store.steps())) or "none"
                raise UserError(f"--resume={resume}: {self.store.folder} has no checkpoint of that step; it has: {steps}")
            return folder
        if not Path(resume).exists():
            raise UserError(
                f"{resume}: no such checkpoint folder; --resume takes auto, {STEP}N, or the folder of a checkpoint or run"
            )
        folder = newest_checkpoint(Path(resume))
        step = read_state(folder).step
        later = [other for other in self.store.steps() if other > step]
        if later:
            way = "choose another --run.folder"
            if folder.resolve() == step_folder(self.store.folder, step).resolve():
                way = f"pass --resume={STEP}{step} to move them aside, or {way}"
            raise UserError(f"{self.store.folder}: holds checkpoints of later steps ({', '.join(map(str, later))}); {way}")
        return folder

    def _read(self, folder: Path) -> tuple[Start, Files]:
        """The first rank reads and verifies what all must know; the files of tensors, which are still to be verified."""
        marker = read_marker(folder)
        tensors = {name: record for name, record in marker.files.items() if _holds_tensors(name)}
        verify_files(folder, {name: record for name, record in marker.files.items() if name not in tensors})
        found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
        vouched(folder, marker, [name for name in found if name != MARKER])  # hooks read what is there
        state = read_state(folder)
        start = Start(folder, read_config(folder, state), state, read_index(folder / ENGINE_FOLDER))
        check_fit(folder, start.config, start.train, self.config, self.data_sha256, self.tokenizer)
        return start, tensors


def _holds_tensors(name: str) -> bool:
    return name.startswith(f"{ENGINE_FOLDER}/rank_")
