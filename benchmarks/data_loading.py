"""Speed of the loader: what a step waits for its batches."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.texts import prose
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import TrainLoader

SEQUENCE_LENGTH, GLOBAL_BATCH, MICRO_BATCH, STEPS = 1024, 32, 8, 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder, "texts")
        texts.mkdir()
        for number, text in enumerate(prose(8_000_000)):
            (texts / f"{number:06}.txt").write_text(text, encoding="utf-8")
        prepare(PrepareOptions((str(texts),), Path(folder, "data"), 16384))
        return [{"what": name, "value": value} for name, value in loader_speeds(Path(folder)).items()]


def loader_speeds(folder: Path) -> dict[str, float]:
    """Milliseconds per step with no work between steps, so that prefetching hides nothing."""
    dataset = TokenDataset(folder / "data", "train", SEQUENCE_LENGTH)
    started = perf_counter()
    dataset.prepare_range(0, 1)
    index = perf_counter() - started
    seconds = []
    with TrainLoader(dataset, GLOBAL_BATCH, MICRO_BATCH, 0, 1, STEPS) as loader:
        loader.step(0)
        for step in range(1, STEPS):
            started = perf_counter()
            loader.step(step)
            seconds.append(perf_counter() - started)
    label = f"loader, step of {GLOBAL_BATCH} x {SEQUENCE_LENGTH} tokens, ms"
    return {label: 1e3 * median(seconds), "loader, index of an epoch, ms": 1e3 * index}
