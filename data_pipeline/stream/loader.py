"""A rank's share of each optimizer step of a run on streamed text, which worker processes read and tokenize ahead.

Sample n of the run is sample n // S of stream n mod S. Rank r of R takes of each global batch the turns ≡ r mod R, and owns the
streams ≡ r mod R, since R divides S, and what is left out leaves turn and number the same modulo R. So which samples a global
batch has depends on the text, the seed and S, not on ranks, workers or restarts.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import Config
from data_pipeline.corrupt.draws import sample_seed
from data_pipeline.mix.order import SampleOrder
from data_pipeline.prepare.pool import Worker
from data_pipeline.read.loader import Batch
from data_pipeline.stream.samples import FIELDS, Position
from data_pipeline.stream.text import StreamedText
from data_pipeline.stream.work import Chunk, Reading

AHEAD = 3  # chunks of each stream that are asked for before the first of them is used up
CHUNK = 2048  # tokens, or a stream's part of a global batch: sending single short samples takes longer than tokenizing them
_ADVICE = ("set data.stream.shards or data.stream.shuffle_documents lower", "resume with --resume=auto")


@dataclass
class _Queue:
    """The samples of one stream that have come, or will."""

    worker: int
    arriving: SimpleQueue[Chunk | Exception] = field(default_factory=SimpleQueue)
    samples: deque[tuple[np.ndarray, np.ndarray]] = field(default_factory=deque)  # and the position after each
    stop: Chunk | None = None  # the last one


class StreamLoader:
    """Micro-batches of one rank, step by step, and the positions of its streams after the last step."""

    def __init__(self, config: Config, text: StreamedText, data_rank: int, data_size: int, *, pin_memory: bool = False) -> None:
        """`data_size` divides the number of streams. No process starts before the first step."""
        training, stream = config.training, config.data.stream
        self._text, self._seed, self._pin_memory = text, config.run.seed, pin_memory
        self._batch, self._micro, self._steps = training.global_batch_size, training.micro_batch_size, training.steps
        self._rank, self._ranks = data_rank, data_size
        self._order, self._streams = SampleOrder(training.skip_samples), stream.shards
        self.own = range(data_rank, stream.shards, data_size)
        self.positions = np.zeros((len(self.own), FIELDS), np.int64)  # of own streams, after the samples that were taken
        self._most = min(stream.workers, len(self.own))
        self._count = max(math.ceil(self._batch / self._streams), CHUNK // config.data.sequence_length)  # samples of a chunk
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._queues: dict[int, _Queue] = {}

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0; steps are asked for in their order.

        UserError if the text cannot be read, or ends before.
        """
        if not self._workers:
            self._start()
        turns = range(step * self._batch + self._rank, (step + 1) * self._batch, self._ranks)
        samples = [self._take(self._order.number(turn), step) for turn in turns]
        places = range(0, len(turns), self._micro)
        batches = [_batch(samples[at : at + self._micro], turns[at : at + self._micro], self._seed) for at in places]
        return [batch.pinned() for batch in batches] if self._pin_memory else batches

    def close(self) -> None:
        """End the processes; the loader may not be used afterwards."""
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.end()
        self._workers, self._threads = [], []

    def _start(self) -> None:
        text = self._text
        positions = {number: Position.of(row) for number, row in zip(self.own, self.positions, strict=True)}
        self._queues = {number: _Queue(place % self._most) for place, number in enumerate(self.own)}
        for place in range(self._most):
            numbers = list(self.own[place :: self._most])
            shares = {number: text.share(number) for number in numbers}
            starts = {number: positions[number] for number in numbers}
            worker = Worker(Reading(text.tokenizer, text.fast, text.rules(self._seed), shares, starts), _ADVICE)
            self._workers.append(worker)
        for place, worker in enumerate(self._workers):  # before anything is asked: an answer that nobody takes would block
            queues = {number: self._queues[number] for number in self.own[place :: self._most]}
            thread = threading.Thread(target=_receive, args=(worker, queues), daemon=True, name="stream")
            thread.start()
            self._threads.append(thread)
        for _ in range(AHEAD):
            for number in self.own:
                self._ask(number)

    def _ask(self, number: int) -> None:
        self._workers[self._queues[number].worker].send(0, (number, self._count))

    def _take(self, number: int, step: int) -> np.ndarray:
        """Sample `number` of the run; those of its stream before it are read past."""
        stream, wanted = number % self._streams, number // self._streams
        place = self.own.index(stream)
        while True:
            sample, position = self._next(stream, step)
            self.positions[place] = position
            if Position.of(position).samples > wanted:
                return sample

    def _next(self, stream: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        queue = self._queues[stream]
        while not queue.samples:
            if queue.stop is not None:
                raise UserError(queue.stop.error or self._ended(stream, step))
            arrived = queue.arriving.get()
            if isinstance(arrived, Exception):
                queue.arriving.put(arrived)
                raise arrived
            queue.samples.extend(zip(arrived.samples, arrived.positions, strict=True))
            if arrived.ended or arrived.error is not None:
                queue.stop = arrived
            else:
                self._ask(stream)
        return queue.samples.popleft()

    def _ended(self, stream: int, step: int) -> str:
        """A stream that ends too early; `step` steps had all their samples."""
        passes = int(self._text.data.max_epochs or 1)
        often = "" if passes == 1 else f", read {passes} times,"
        what = f"data.stream: the input{often} lasts for {step:,} of {self._steps:,} steps; stream {stream} ends first"
        if step == 0:
            return f"{what}: name more input, or set data.stream.shards lower"
        enough = math.ceil(passes * self._steps / step)
        return f"{what}: name more input, set training.steps to {step} or data.max_epochs to {enough}, which reads it again"


def _receive(worker: Worker, queues: dict[int, _Queue]) -> None:
    """Pass on what a worker sends, until it ends."""
    try:
        while True:
            chunk: Chunk = worker.receive()
            queues[chunk.stream].arriving.put(chunk)
    except Exception as error:
        for queue in queues.values():
            queue.arriving.put(error)


def _batch(samples: list[np.ndarray], turns: range, seed: int) -> Batch:
    tokens = torch.from_numpy(np.stack(samples).astype(np.int64))
    seeds = torch.tensor([sample_seed(f"training, seed {seed}", turn) for turn in turns])
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), seeds=seeds)
