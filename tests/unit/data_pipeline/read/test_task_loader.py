"""The rows of a task as batches: each row once, predicting its choice alone, in few shapes that all ranks share."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.read.task_file import Row, Task
from data_pipeline.read.task_loader import TaskLoader

MICRO = 3


def task_of(*lengths: int) -> Task:
    """Rows of so many tokens, all different, of which the last two are scored."""
    rows = [Row([100 * number + place for place in range(length)], 2) for number, length in enumerate(lengths)]
    return Task("docs", [], rows, 0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_row_is_in_one_batch_of_one_rank(ranks: int) -> None:
    task = task_of(*range(3, 17))
    loaders = [TaskLoader(task, 16, MICRO, rank, ranks) for rank in range(ranks)]
    seen: list[int] = []
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader) == -(-len(task.rows) // (MICRO * ranks))
        for numbers, batch in batches:
            assert batch.tokens.shape == batch.labels.shape == (MICRO, 16)
            assert batch.weights is not None
            assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
            assert batch.weights[len(numbers) :].sum() == 0
            for number, tokens, labels, weights in zip(numbers, batch.tokens, batch.labels, batch.weights, strict=False):
                row = task.rows[number].tokens
                assert tokens[: len(row) - 1].tolist() == row[:-1]
                assert labels[weights == 1].tolist() == row[-2:]
                assert weights.sum() == 2
            seen += numbers
    assert sorted(seen) == list(range(len(task.rows)))


def test_short_rows_come_in_short_batches_of_the_same_length_on_all_ranks() -> None:
    """Rows of up to S + 1 tokens fit a batch of length S. 384 is halved to 192, which is no multiple of 128, and not again."""
    sizes = [257, 3, 129, 257, 10, 65, 257, 200, 129, 257, 130, 10, 258, 250, 129, 65]
    for length, lengths in {512: [512, 512, 256, 128, 64], 384: [384, 384, 384, 192, 192], 100: [100] * 5}.items():
        longest = min(length, 512) + 1
        rows = [longest] * 4 + [min(longest, size) for size in sizes]
        loaders = [TaskLoader(task_of(*rows), length, 2, rank, 2) for rank in range(2)]
        shapes = [[batch.tokens.shape[1] for _, batch in loader] for loader in loaders]
        assert shapes[0] == shapes[1] == lengths
