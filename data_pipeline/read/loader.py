"""A rank's share of each optimizer step and of a validation pass.

A global batch has the same samples in the same order for any number of data-parallel ranks: micro-batch m of rank r holds the
samples step·G + (m·ranks + r)·micro + [0, micro).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch

from data_pipeline.corrupt.draws import sample_seed


class Samples(Protocol):
    """Numbered samples: `TokenDataset`, whose methods say more, or tokens of another origin."""

    samples_per_epoch: int

    def prepare_range(self, first: int, last: int) -> None: ...

    def sample(self, number: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU; labels[b, s] is the token after tokens[b, s]."""

    tokens: torch.Tensor  # int64 [micro, sequence_length]
    labels: torch.Tensor  # int64 [micro, sequence_length]
    weights: torch.Tensor | None = None  # float32 [micro, sequence_length]: how much each label counts; None: all count once
    seeds: torch.Tensor | None = None  # int64 [micro]: of what an objective draws for each sample, the same on every layout

    def pinned(self) -> Self:
        """The same in memory that a GPU copies from while it computes."""
        weights = None if self.weights is None else self.weights.pin_memory()
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory(), weights=weights)


class Loader(Protocol):
    """What a run trains on, as its loop sees it: `TrainLoader`, whose methods say more, or batches of another origin."""

    def step(self, step: int) -> list[Batch]: ...

    def close(self) -> None: ...


class TrainLoader:
    """Micro-batches of one rank, step by step; a background thread reads the next step ahead."""

    def __init__(
        self,
        dataset: Samples,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        steps: int,
        *,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`global_batch_size` is a multiple of `micro_batch_size` · `data_size`; nothing is read for step `steps` and later.

        `seed`: of what objectives draw for a sample, together with its turn. `pin_memory`: batches are in pinned memory, for a
        GPU.
        """
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._steps, self._seed = steps, seed
        self._pin_memory = pin_memory
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` < `steps`, counted from 0.

        All ranks ask for the same steps in the same order. Any order works; consecutive steps are fastest. Errors of the
        background thread are raised here.
        """
        assert step < self._steps
        if self._ahead is not None and self._ahead[0] != step:
            self._ahead[1].cancel()
            wait([self._ahead[1]])  # it may be reading an epoch that prepare_range releases
            self._ahead = None
        # In the main thread, because it may wait for other ranks; the range includes the step that is read ahead.
        self._dataset.prepare_range(step * self._global_batch_size, min(step + 2, self._steps) * self._global_batch_size)
        _, reading = self._ahead or self._start(step)
        batches = reading.result()
        self._ahead = self._start(step + 1) if step + 1 < self._steps else None
        return batches

    def close(self) -> None:
        """Stop reading ahead; the loader may not be used afterwards."""
        self._reader.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, step: int) -> tuple[int, Future[list[Batch]]]:
        return step, self._reader.submit(self._read, step)

    def _read(self, step: int) -> list[Batch]:
        micro, ranks = self._micro_batch_size, self._data_size
        passes = self._global_batch_size // (micro * ranks)
        starts = [step * self._global_batch_size + (m * ranks + self._data_rank) * micro for m in range(passes)]
        batches = [_batch(self._dataset, range(start, start + micro), f"training, seed {self._seed}") for start in starts]
        return [batch.pinned() for batch in batches] if self._pin_memory else batches


class ValidationLoader:
    """The first `samples` samples, in the same order at every pass, shared out over the ranks in equal numbers of batches.

    `samples` None, or more than the split has: all samples. Each sample counts once: those that only fill up the last batch
    have weight 0.
    """

    def __init__(self, dataset: Samples, samples: int | None, micro_batch_size: int, data_rank: int, data_size: int) -> None:
        """All ranks construct it together, because it prepares the data set."""
        available = dataset.samples_per_epoch
        self.samples = available if samples is None else min(samples, available)
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        dataset.prepare_range(0, self.samples)

    def __len__(self) -> int:
        """Batches of each rank."""
        return math.ceil(self.samples / (self._micro_batch_size * self._data_size))

    def __iter__(self) -> Iterator[Batch]:
        micro = self._micro_batch_size
        self._dataset.prepare_range(0, self.samples)  # all is there, unless files have been changed
        for turn in range(len(self)):
            start = (turn * self._data_size + self._data_rank) * micro
            numbers = range(start, start + micro)
            batch = _batch(self._dataset, [min(number, self.samples - 1) for number in numbers], "held out")
            counts_B1 = torch.tensor([[float(number < self.samples)] for number in numbers])
            yield replace(batch, weights=counts_B1.expand(batch.labels.shape))


def _batch(dataset: Samples, numbers: Sequence[int], origin: str) -> Batch:
    """The samples with these numbers; their seeds are of the numbers and `origin`."""
    samples = torch.from_numpy(np.stack([dataset.sample(number) for number in numbers]))
    seeds = torch.tensor([sample_seed(origin, number) for number in numbers])
    return Batch(samples[:, :-1].contiguous(), samples[:, 1:].contiguous(), seeds=seeds)
