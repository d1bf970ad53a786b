"""A run on streamed text: its batches, of which all ranks hear if one has none, and where its streams stand in checkpoints."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from configs.errors import UserError
from configs.schema import Config
from data_pipeline.read.loader import Batch, NoBatchError
from data_pipeline.stream.loader import StreamLoader
from data_pipeline.stream.samples import FIELDS, Position
from pretrain.checkpoints.state import Part, State
from pretrain.distributed.collectives import mean_over_ranks, together
from pretrain.distributed.layout import Layout
from pretrain.loop.hooks import Hook

if TYPE_CHECKING:
    from pretrain.checkpoints.resume import Read, Start
    from pretrain.loop.trainer import Trainer

KIND, NAME = "stream", "positions"  # of the tensor in checkpoints, int64 [S, FIELDS]


class SharedBatches:
    """The batches of a `StreamLoader`; if one rank cannot have its own, all raise the same NoBatchError."""

    def __init__(self, loader: StreamLoader, layout: Layout) -> None:
        self.own, self._layout = loader, layout
        replicas = layout.size("tensor") * layout.size("pipeline")  # ranks that must read the same text
        # Over those ranks the sum of weight · hash is 0 if all have one hash, exactly in float64 below a million ranks.
        self._weight = replicas * (layout.coordinate("tensor") == layout.coordinate("pipeline") == 0) - 1

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches; every rank calls it. After an error the streams stand where they stood before."""
        before, batches = self.own.positions.copy(), list[Batch]()
        failure: Exception | None = None
        try:
            batches = self.own.step(step)
        except Exception as error:
            failure = error
        of_program = failure is not None and not isinstance(failure, OSError | UserError)
        read = self._weight * zlib.crc32(self.own.positions.tobytes())
        figures = [float(failure is not None), float(of_program), float(read)]
        failed, faults, differing = mean_over_ranks(figures, self._layout.device)
        if failed or differing:
            self.own.positions[:] = before
        if failed:
            try:
                together(lambda: _raise(failure))
            except UserError as error:
                if faults:
                    raise
                raise NoBatchError(str(error)) from error
        if differing:
            raise NoBatchError(
                "data.stream: tensor-parallel ranks or stages of one pipeline have read different text: its files differ "
                "between machines, or were changed while the run reads them; make them the same and resume with --resume=auto"
            )
        return batches

    def close(self) -> None:
        self.own.close()


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


class Positions(Hook):
    """Keeps in checkpoints where each stream stands after the step, and writes how much of the text has been read."""

    priority = 20

    def __init__(self, config: Config, layout: Layout, loader: StreamLoader, sha256: str) -> None:
        """`sha256`: of the streamed text, as checkpoints have it."""
        self._loader, self._layout, self._sha256 = loader, layout, sha256
        self._shape = (config.data.stream.shards, FIELDS)
        self._writes = layout.coordinate("tensor") == 0 and layout.coordinate("pipeline") == 0
        self._every = config.logging.every_steps

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self._every and trainer.step != trainer.config.training.steps:
            return
        own = [Position.of(row) for row in self._loader.positions]
        sums = [sum(at.documents for at in own), sum(at.text_bytes for at in own), sum(at.passes for at in own)]
        documents, text_bytes, passes = mean_over_ranks([float(value) for value in sums], self._layout.device)
        ranks = self._layout.size("data")
        figures = {"documents": documents * ranks, "bytes": text_bytes * ranks, "epochs": passes * ranks / self._shape[0]}
        trainer.metrics.write(trainer.step, {f"data/{name}": value for name, value in figures.items()})

    def state(self) -> State:
        rows = torch.from_numpy(self._loader.positions.copy())
        return State([self._part(number, row) for number, row in zip(self._loader.own, rows, strict=True)], {})

    def load_state(self, start: Start, read: Read) -> str | None:
        state = self.state()
        read(state)
        for place, part in enumerate(state.parts):
            self._loader.positions[place] = part.tensor[0].numpy()
        if start.train.data_sha256 == self._sha256:
            return None
        return "stream  files have other sizes than when the checkpoint was saved; what had been read of them must be as it was"

    def _part(self, number: int, row: torch.Tensor) -> Part:
        return Part(NAME, KIND, self._shape, (number, 0), row[None], self._writes)
