"""Two real ranks build the index together, read disjoint samples and fail together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import TrainLoader, ValidationLoader
from tests.helpers import joined, run_ranks

RANKS, LENGTH, GLOBAL_BATCH, MICRO = 2, 16, 8, 2


def read_steps(folder: Path, rank: int, ranks: int, packing: str) -> np.ndarray:
    """All micro-batches of this rank over the ends of three epochs: int64 [steps, micro-batches, MICRO, LENGTH]."""
    dataset = TokenDataset(folder, "train", LENGTH, seed=3, packing=packing)
    steps = 3 * dataset.samples_per_epoch // GLOBAL_BATCH + 2
    with TrainLoader(dataset, GLOBAL_BATCH, MICRO, rank, ranks, steps) as loader:
        return np.stack([np.stack([batch.tokens.numpy() for batch in loader.step(step)]) for step in range(steps)])


def work(rank: int, folder: Path, results: Path, packing: str) -> None:
    with joined(rank, RANKS, results):
        np.save(results / f"train{rank}.npy", read_steps(folder, rank, RANKS, packing))
        validation = ValidationLoader(TokenDataset(folder, "valid", LENGTH, packing=packing), None, MICRO, rank, RANKS)
        np.save(results / f"valid{rank}.npy", np.stack([batch.tokens.numpy() for batch in validation]))
        torch.distributed.barrier()
        # Rank 0 cannot write the index of another seed: no rank may wait for ever.
        if rank == 0:
            (folder / "index").rename(folder / "moved")
            (folder / "index").touch()
        torch.distributed.barrier()
        try:
            TokenDataset(folder, "train", LENGTH, seed=9, packing=packing).prepare_range(0, 1)
        except UserError as error:
            (results / f"error{rank}.txt").write_text(str(error))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_two_ranks_share_index_batches_and_errors(tmp_path: Path, packing: str) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"line {number} of {number * 7919}" for number in range(100)))
    folder = tmp_path / "data"
    prepare(PrepareOptions((str(tmp_path / "text.txt"),), folder, 300, split=(8, 2, 0), read=ReadOptions("line")))
    run_ranks(work, RANKS, folder, tmp_path, packing)
    (folder / "index").unlink()
    (folder / "moved").rename(folder / "index")
    built = sorted(path.name for path in (folder / "index").iterdir())
    assert [name.split("-", 1)[1] for name in built if "train" in name] == [f"train-s16-seed3-epoch{epoch}" for epoch in (2, 3)]
    alone = read_steps(folder, 0, 1, packing)
    assert sorted(path.name for path in (folder / "index").iterdir()) == built
    first, second = (np.load(tmp_path / f"train{rank}.npy") for rank in range(RANKS))
    np.testing.assert_array_equal(np.stack([first, second], axis=2).reshape(alone.shape), alone)
    held_out = np.concatenate([np.load(tmp_path / f"valid{rank}.npy") for rank in range(RANKS)], axis=1).reshape(-1, LENGTH)
    dataset = TokenDataset(folder, "valid", LENGTH, packing=packing)
    dataset.prepare_range(0, 1)
    expected = [dataset.sample(number)[:-1] for number in range(dataset.samples_per_epoch)]
    np.testing.assert_array_equal(held_out[: len(expected)], expected)
    assert "must be writable" in (tmp_path / "error0.txt").read_text()
    assert "rank 0 could not write it" in (tmp_path / "error1.txt").read_text()
