"""Ranks that must read the same text go on while they do, and all end at the step where they do not."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.read.loader import NoBatchError
from data_pipeline.stream.loader import StreamLoader
from data_pipeline.stream.text import StreamedText
from pretrain.distributed.collectives import gather_objects
from pretrain.loop.streaming import SharedBatches
from tests.helpers import joined, run_ranks
from tests.unit.data_pipeline.stream.by_hand import texts, write
from tests.unit.data_pipeline.stream.test_loader import SHARDS, STEPS, config_of


def read(rank: int, folder: Path, prepared: Path) -> None:
    with joined(rank, 2, folder, tensor=2) as layout:
        for text, error in ((folder / "0", None), (folder / str(rank), "have read different text: its files differ")):
            config = config_of(text, prepared)
            loader = StreamLoader(config, StreamedText.of(config.data), 0, 1)
            batches, stands = SharedBatches(loader, layout), [loader.positions.copy()]
            with closing(batches), nullcontext() if error is None else pytest.raises(NoBatchError, match=error):
                for step in range(STEPS):
                    batches.step(step)
                    stands.append(loader.positions.copy())
            assert (len(stands) == STEPS + 1) == (error is None)
            assert len(stands) > 1
            np.testing.assert_array_equal(loader.positions, stands[-1])
            one, other = gather_objects(stands)
            np.testing.assert_array_equal(one, other)


def test_ranks_of_one_model_that_read_different_text_end(tmp_path: Path, prepared: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        for number in range(SHARDS):
            documents = texts(30, number, longest=3)
            if (rank, number) == (1, 2):
                documents[6:] = texts(30, 9)[6:]
            write(tmp_path / str(rank) / f"{number}.jsonl", documents)
    run_ranks(read, 2, tmp_path, prepared)
