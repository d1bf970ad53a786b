"""Real worker processes: global batches by hand on any number of ranks, resumed anywhere; what ends a run; what is left."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from configs.errors import UserError
from configs.schema import Config
from data_pipeline.read.manifest import TOKENIZER
from data_pipeline.stream.loader import StreamLoader
from data_pipeline.stream.text import StreamedText
from tests.helpers import wait_until
from tests.unit.data_pipeline.stream.by_hand import global_batch, json_lines, samples_of, shuffled, texts, tokens_of, write

LENGTH, SEED, SHARDS, BATCH, STEPS = 8, 7, 4, 8, 4
FILES = [texts(10, number) for number in range(SHARDS + 2)]
MODEL = {"attention": "mha", "hidden_size": 16, "num_layers": 1, "num_heads": 2}


def config_of(folder: Path, prepared: Path, passes: int = 1, skip: Sequence[list[int]] = (), **of_stream: object) -> Config:
    stream = {"input": [str(folder)], "tokenizer": str(prepared), "shards": SHARDS, "shuffle_documents": 3, **of_stream}
    training = {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2, "skip_samples": list(skip)}
    data = {"stream": stream, "sequence_length": LENGTH, "max_epochs": passes}
    run = {"folder": "run", "seed": SEED}
    return Config.model_validate({"run": run, "model": MODEL, "data": data, "training": training})


@pytest.fixture
def text_files(tmp_path: Path) -> Path:
    for number, documents in enumerate(FILES):
        write(tmp_path / f"{number}.jsonl.zst", documents)
    return tmp_path


@contextmanager
def loaders(config: Config, ranks: int, positions: np.ndarray | None = None) -> Iterator[list[StreamLoader]]:
    """Those of all ranks; `positions` of all streams."""
    text = StreamedText.of(config.data)
    made = [StreamLoader(config, text, rank, ranks) for rank in range(ranks)]
    if positions is not None:
        for loader in made:
            loader.positions[:] = positions[loader.own]
    try:
        yield made
    finally:
        for loader in made:
            loader.close()


def taken(loaders: Sequence[StreamLoader], step: int) -> dict[tuple[int, ...], int]:
    """The samples of a global batch, and the seed of each."""
    rows = dict[tuple[int, ...], int]()
    for loader in loaders:
        batches = loader.step(step)
        assert [batch.tokens.shape for batch in batches] == [(2, LENGTH)] * (BATCH // 2 // len(loaders))
        for batch in batches:
            both = np.concatenate([batch.tokens.numpy(), batch.labels.numpy()[:, -1:]], axis=1)
            assert batch.seeds is not None
            rows |= {tuple(row): seed for row, seed in zip(both.tolist(), batch.seeds.tolist(), strict=True)}
            np.testing.assert_array_equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    return rows


def all_positions(loaders: Sequence[StreamLoader]) -> np.ndarray:
    found = np.zeros((sum(len(loader.own) for loader in loaders), loaders[0].positions.shape[1]), np.int64)
    for loader in loaders:
        found[loader.own] = loader.positions
    return found


def by_hand(prepared: Path, streams: int = SHARDS) -> list[np.ndarray]:
    """All samples of each stream."""
    own = [[document for file in FILES[k::streams] for document in file] for k in range(streams)]
    orders = [shuffled(documents, k, 0, SEED, 3) for k, documents in enumerate(own)]
    return [samples_of(tokens_of(documents, prepared / TOKENIZER), LENGTH) for documents in orders]


@pytest.mark.parametrize(
    ("ranks", "workers", "others"), [(1, 2, [2]), (2, 1, [1, 2]), pytest.param(4, 1, [1, 2, 4], marks=pytest.mark.thorough)]
)
def test_global_batches_on_any_ranks_and_from_any_step(
    text_files: Path, prepared: Path, ranks: int, workers: int, others: list[int]
) -> None:
    config, streams = config_of(text_files, prepared, workers=workers), by_hand(prepared)
    expected = [global_batch(streams, range(step * BATCH, (step + 1) * BATCH)) for step in range(STEPS)]
    positions, batches = [], []
    with loaders(config, ranks) as everyone:
        for step in range(STEPS):
            batches.append(taken(everyone, step))
            assert batches[step].keys() == expected[step]
            positions.append(all_positions(everyone))
            assert positions[step][:, -1].tolist() == [(step + 1) * BATCH // SHARDS] * SHARDS  # not what was read ahead
    assert len({seed for batch in batches for seed in batch.values()}) == STEPS * BATCH
    for other in others:
        for step in range(1, STEPS) if other == others[0] else [2]:
            with loaders(config_of(text_files, prepared), other, positions[step - 1]) as everyone:
                assert taken(everyone, step) == batches[step]
                if step + 1 < STEPS:
                    assert taken(everyone, step + 1) == batches[step + 1]
                    np.testing.assert_array_equal(all_positions(everyone), positions[step + 1])


def test_streams_that_do_not_divide_a_batch(text_files: Path, prepared: Path) -> None:
    config, streams = config_of(text_files, prepared, shards=6), by_hand(prepared, 6)
    expected = [global_batch(streams, range(step * BATCH, (step + 1) * BATCH)) for step in range(3)]
    with loaders(config, 2) as everyone:
        assert [taken(everyone, step).keys() for step in range(2)] == expected[:2]
        positions = all_positions(everyone)
    with loaders(config, 1, positions) as everyone:
        assert taken(everyone, 2).keys() == expected[2]


def test_samples_that_are_left_out_are_read_past(text_files: Path, prepared: Path) -> None:
    streams = by_hand(prepared)
    with loaders(config_of(text_files, prepared, skip=[[4, 12]]), 2) as everyone:
        assert taken(everyone, 0).keys() == global_batch(streams, [0, 1, 2, 3, 12, 13, 14, 15])
        assert taken(everyone, 1).keys() == global_batch(streams, range(16, 24))


def test_a_stream_that_ends_early_says_how_long_it_lasted(tmp_path: Path, prepared: Path) -> None:
    for number in range(SHARDS):
        write(tmp_path / f"{number}.jsonl", texts(4, 1, longest=5 if number == 2 else 60))
    lasts = len(samples_of(tokens_of(texts(4, 1, longest=5), prepared / TOKENIZER), LENGTH)) // 2
    assert 0 < lasts < STEPS
    expected = (
        rf"lasts for {lasts} of {STEPS} steps; stream 2 ends first: name more input, set training.steps to {lasts} or "
        rf"data.max_epochs to {-(-STEPS // lasts)}, which reads it again"
    )
    with loaders(config_of(tmp_path, prepared), 1) as (loader,):
        for step in range(lasts):  # what is read ahead of the end is no error yet
            loader.step(step)
        for _ in range(2):
            with pytest.raises(UserError, match=expected):
                loader.step(lasts)
    with loaders(config_of(tmp_path, prepared, passes=-(-STEPS // lasts)), 1) as (loader,):
        for step in range(STEPS):
            loader.step(step)


def test_damage_is_an_error_of_the_step_that_needs_it_and_only_there(tmp_path: Path, prepared: Path) -> None:
    for number in range(SHARDS):
        write(tmp_path / f"{number}.jsonl", texts(12, number))
    (tmp_path / "3.jsonl").write_bytes(json_lines(texts(3, 3, longest=5)) + b"{broken\n")
    lasts = len(samples_of(tokens_of(texts(3, 3, longest=5), prepared / TOKENIZER), LENGTH)) // 2
    assert 0 < lasts < STEPS
    with loaders(config_of(tmp_path, prepared), 2) as everyone:
        for step in range(lasts):
            taken(everyone, step)
        everyone[0].step(lasts)
        with pytest.raises(UserError, match=r"3\.jsonl:4: not valid JSON"):
            everyone[1].step(lasts)


def test_a_worker_that_is_killed_is_an_error_and_none_is_left(text_files: Path, prepared: Path) -> None:
    before = set(psutil.Process().children())
    with loaders(config_of(text_files, prepared, workers=2, passes=1000), 1) as (loader,):
        loader.step(0)
        own = set(psutil.Process().children()) - before
        assert len(own) == 2
        for process in own:  # as Slurm does, whose signal is for the run to answer
            process.send_signal(signal.SIGTERM)
        loader.step(1)
        os.kill(min(process.pid for process in own), signal.SIGKILL)
        with pytest.raises(UserError, match=r"a worker process was ended by signal 9.* set data.stream.shards.*--resume=auto"):
            deque(map(loader.step, range(2, 1000)), maxlen=0)
    wait_until(lambda: not any(process.is_running() for process in own))
