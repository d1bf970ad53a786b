"""Saving while training goes on: a copy in host memory, a thread that writes it, and one rank that puts the whole in place.

`begin` copies this rank's part of the state; its thread writes it. Once `written` is true on every rank, all call `finish`, and
the first rank gives the checkpoint its name. At most one checkpoint is being written.
"""

from __future__ import annotations

import shutil
import sys
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Config
from data_pipeline.read.manifest import FileRecord, file_record
from pretrain.checkpoints.files import Holding, Index, holding, make_index, write_parts
from pretrain.checkpoints.folder import ENGINE_FOLDER, TrainState
from pretrain.checkpoints.generators import generators
from pretrain.checkpoints.state import NotFiniteError, Part, State
from pretrain.checkpoints.store import CheckpointStore, write_common, write_state
from pretrain.distributed.collectives import OtherRankError, broadcast_object, gather_objects, gather_to_main, together
from pretrain.distributed.layout import Layout

Files = dict[str, FileRecord]
WriteMore = Callable[[Path], list[Path]]


@dataclass(frozen=True)
class _Outcome:
    """What became of a rank's part of a checkpoint."""

    files: Files = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    error: UserError | None = None


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    train: TrainState
    scalars: Mapping[str, float]
    writing: Future[Files]

    def outcome(self) -> _Outcome:
        """Waits until this rank has written. Any other exception than a fault that a user can mend is raised."""
        try:
            return _Outcome(self.writing.result(), self.scalars)
        except UserError as error:
            return _Outcome(error=error)
        except OSError as error:
            return _Outcome(error=UserError(str(error)))


class Saver:
    """Writes the checkpoints of one run; every rank has one, and calls `begin` and `finish` together with the others."""

    def __init__(self, store: CheckpointStore, layout: Layout, config: Config, data_sha256: str, tokenizer: str) -> None:
        """`config` is resolved; `data_sha256` are those of the sources' manifests. Every rank makes one."""
        self.store = CheckpointStore(store.run_folder, attempt=broadcast_object(uuid.uuid4().hex[:8]))
        self.layout, self.config, self.tokenizer = layout, config, tokenizer
        self.data_sha256 = data_sha256
        asynchronous = config.checkpoint.asynchronous
        self.asynchronous = not config.parallel.cpu_offload if asynchronous is None else asynchronous
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._host = HostCopies(layout.device)
        self._holding: Holding | None = None  # what the index was made of
        self._index: Index | None = None  # on the first rank
        self._pending: _Pending | None = None

    @property
    def pending(self) -> int | None:
        """The step of the checkpoint that is being written."""
        return None if self._pending is None else self._pending.train.step

    @property
    def written(self) -> bool:
        """True once this rank has written its part of the pending checkpoint, or failed to."""
        return self._pending is not None and self._pending.writing.done()

    def begin(self, step: int, state: State, write_more: WriteMore = lambda folder: [], waits: bool = False) -> None:
        """Begin to write the checkpoint of `step`: this rank's part of the state, and its generators.

        `write_more` writes other files and lists them, before `begin` returns. `waits`: the state stays as it is until
        `finish`, so that it need not be copied. UserError on every rank if the folder cannot be made; `finish` raises all else.
        """
        assert self._pending is None
        train = TrainState(step, self.layout.world_size, self.data_sha256, notes=dict(state.notes))
        try:
            together(lambda: self.store.make_partial(step), main_only=True)
            self._plan(holding(state))
        except UserError as error:
            raise self._failed(step, error) from None
        owned = [part for part in state.parts if part.owned]
        parts = self._host.copies(owned) if self.asynchronous and not waits else owned
        scalars: Mapping[str, float] = {}
        try:
            scalars = state.scalar_values()
            more = self._records(step, write_more(self.store.partial(step)))
        except (OSError, UserError) as error:  # of this rank alone: the others hear of it in `finish`
            writing: Future[Files] = Future()
            writing.set_exception(error)
        else:
            writing = self._thread.submit(partial(self._write, step, parts, generators(self.layout.device), more))
        self._pending = _Pending(train, scalars, writing)

    def finish(self) -> Path:
        """Wait until every rank has written the pending checkpoint, and put it in place; its folder.

        UserError on every rank when any rank could not write: nothing is left of it then, and the run's other checkpoints are
        as they were. NotFiniteError if there was no sense in it.
        """
        assert self._pending is not None
        pending, self._pending = self._pending, None
        folders: list[Path] = []
        own: list[_Outcome] = []
        try:
            together(lambda: own.append(pending.outcome()))
            outcomes = gather_to_main(own[0])
            together(lambda: folders.append(self._put_in_place(pending.train, outcomes)), main_only=True)
        except UserError as error:
            raise self._failed(pending.train.step, error) from None
        return self.store.path(pending.train.step)

    def clear_old(self) -> None:
        """Delete the checkpoints that the run's policy does not keep, in the thread of the first rank."""
        if not self.layout.is_main:
            return
        try:
            for folder in self.store.take_old(self.config.checkpoint):
                self._thread.submit(shutil.rmtree, folder, ignore_errors=True)
        except OSError as error:
            print(f"warning: {self.store.folder}: cannot be listed ({error.strerror})", file=sys.stderr, flush=True)

    def close(self, waits: bool = True) -> None:
        """End the thread, by default once it has done what there is to do; nothing can be saved afterwards."""
        self._thread.shutdown(wait=waits, cancel_futures=not waits)

    def _plan(self, own: Holding) -> None:
        """Make the index, on the first rank, unless all ranks write the same parts as last time."""
        if any(gather_objects(own != self._holding)):
            self._holding = self._index = None  # until a new index is made
            holdings = gather_to_main(own)
            together(lambda: setattr(self, "_index", make_index(holdings)), main_only=True)
            self._holding = own

    def _write(self, step: int, parts: Sequence[Part], others: Mapping[str, Tensor], more: Files) -> Files:
        """Write this rank's file, and on the first rank those of all; the records of these and of `more`."""
        folder = self.store.partial(step)
        path, record = write_parts(folder / ENGINE_FOLDER, self.layout.rank, parts, others, only_finite=True)
        files = {**more, str(path.relative_to(folder)): record}
        if self.layout.is_main:
            assert self._index is not None
            files |= write_common(folder, self.config, self.tokenizer, self._index)
        return files

    def _records(self, step: int, paths: Sequence[Path]) -> Files:
        return {str(path.relative_to(self.store.partial(step))): file_record(path) for path in paths}

    def _put_in_place(self, train: TrainState, outcomes: Sequence[_Outcome]) -> Path:
        files: Files = {}
        scalars: dict[str, float] = {}
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        for error in sorted(errors, key=lambda error: not isinstance(error, NotFiniteError)):
            raise error  # one that ends the run before those that do not
        for rank, outcome in enumerate(outcomes):
            for name, value in outcome.scalars.items():
                if scalars.setdefault(name, value) != value:
                    raise UserError(f"{name}: is {value} on rank {rank}, {scalars[name]} before: it must be one value")
            files |= outcome.files
        files |= write_state(self.store.partial(train.step), replace(train, scalars=scalars))
        return self.store.put_in_place(train.step, files)

    def _failed(self, step: int, error: UserError) -> UserError:
        """Delete what there is of a checkpoint; the error of it."""
        if self.layout.is_main:
            self.store.discard(step)
        return error if isinstance(error, NotFiniteError | OtherRankError) else self.store.not_saved(step, error)


class HostCopies:
    """Copies of parts in host memory, all in one block, which is used again for the next copies.

    For a GPU the block is page-locked, so that the copies run at the speed of the bus; where the system refuses to lock so much
    memory, it is not. torch's own pinned memory comes in powers of two: up to twice what is needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block = torch.empty(0, dtype=torch.uint8)
        self._lock: weakref.finalize[..., HostCopies] | None = None  # called, it unlocks the block

    def copies(self, parts: Sequence[Part]) -> list[Part]:
        """The parts with their values of now; valid until the next call. Fixed parts keep them by themselves."""
        changing = [part for part in parts if not part.fixed]
        starts = list(accumulate((_aligned(part.tensor.nbytes) for part in changing), initial=0))
        self._reserve(starts[-1])
        copied = [replace(part, tensor=self._at(start, part.tensor)) for start, part in zip(starts, changing, strict=False)]
        for part, copy in zip(changing, copied, strict=True):
            copy.tensor.copy_(part.tensor.detach(), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [*copied, *(part for part in parts if part.fixed)]

    def _at(self, start: int, like: Tensor) -> Tensor:
        return self._block[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def _reserve(self, size: int) -> None:
        if len(self._block) == size:
            return
        if self._lock is not None:
            self._lock()
            self._lock = None
        self._block = torch.empty(size, dtype=torch.uint8)
        if self._device.type == "cuda" and size > 0:
            runtime: Any = torch.cuda.cudart()
            address = self._block.data_ptr()
            if int(runtime.cudaHostRegister(address, size, 0)) == 0:
                self._lock = weakref.finalize(self, runtime.cudaHostUnregister, address)
            else:
                with suppress(RuntimeError):
                    torch.ones(1, device=self._device).add_(1)  # takes the refusal, which torch reports at its next kernel


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
