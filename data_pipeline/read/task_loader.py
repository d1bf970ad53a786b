"""A rank's share of the rows of a multiple-choice task, as batches of equal shape on all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from data_pipeline.read.loader import Batch
from data_pipeline.read.task_file import Row, Task

MULTIPLE = 64  # of tokens in a row that is shorter than the longest, for kernels and tensor-parallel ranks


class TaskLoader:
    """Micro-batches of a task's rows, the longest first; each row in one batch of one data-parallel rank.

    A batch is as long as its rows need: the sequence length, or that halved as often as it stays a multiple of 64. So there are
    few shapes, and all ranks have the same one at a time.
    """

    def __init__(self, task: Task, sequence_length: int, micro_batch_size: int, data_rank: int, data_size: int) -> None:
        self.task, self._length = task, sequence_length
        self._micro_batch_size, self._data_rank, self._data_size = micro_batch_size, data_rank, data_size
        lengths = [len(row.tokens) for row in task.rows]
        self._order = sorted(range(len(lengths)), key=lambda number: -lengths[number])

    def __len__(self) -> int:
        """Batches of each rank."""
        return math.ceil(len(self._order) / (self._micro_batch_size * self._data_size))

    def __iter__(self) -> Iterator[tuple[list[int], Batch]]:
        """Numbers of rows and a batch that begins with them; what else it has weighs nothing."""
        micro, every = self._micro_batch_size, self._micro_batch_size * self._data_size
        for start in range(0, len(self._order), every):
            of_ranks = self._order[start : start + every]
            own = of_ranks[self._data_rank * micro : (self._data_rank + 1) * micro]
            yield own, self._batch([self.task.rows[number] for number in own], self._shortest(of_ranks[0]))

    def _shortest(self, number: int) -> int:
        """The length of a batch whose longest row is this one."""
        length, needed = self._length, len(self.task.rows[number].tokens) - 1
        while length % (2 * MULTIPLE) == 0 and length // 2 >= needed:
            length //= 2
        return length

    def _batch(self, rows: list[Row], length: int) -> Batch:
        tokens_BT = torch.zeros(self._micro_batch_size, length + 1, dtype=torch.long)  # any id: no token sees a later one
        weights_BS = torch.zeros(self._micro_batch_size, length)
        for place, row in enumerate(rows):
            end = len(row.tokens)
            tokens_BT[place, :end] = torch.tensor(row.tokens)
            weights_BS[place, end - 1 - row.scored : end - 1] = 1.0
        return Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous(), weights_BS)
