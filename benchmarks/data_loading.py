"""What a training step waits for its batches, and what they cost.

The model of configs/quickstart_cpu.yaml is trained by the Trainer that launch/pretrain.py uses, in one process. The loaders
take turns, some steps each: `one` folder; a `mixture` of four; and `DataLoader`, what a user of torch would write over the same
token file, with one worker process that reads ahead, or none. `wait_ms` is what the loop waits for the batches of a step,
`cpu_ms` the CPU time of reading them in this process, `cpu_percent` that of the CPU time of the whole step, which depends less
on other work of the machine. The first step of a turn, which nobody has read ahead, does not count.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time, thread_time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.generated_tokens import tokenizer_folder, write_generated
from benchmarks.training import build
from configs.load import load_config
from launch.common import CHECKS, whole_number

if TYPE_CHECKING:
    from data_pipeline.read.loader import Batch

SOURCES, TURN = 4, 6  # folders of the mixture; steps of a turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/quickstart_cpu.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--turns", type=whole_number(1), default=8, metavar="N", help="of each loader (default: 8)")
    parser.add_argument("--tokens", type=whole_number(10**5), default=10**7, metavar="N", help="of all folders (default: 10^7)")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        small = tokenizer_folder(folder)
        sources = [folder / f"part{number}" for number in range(SOURCES)]
        for number, source in enumerate(sources):
            write_generated(source, arguments.tokens // SOURCES, small, seed=number)
        return _measured(arguments, sources, folder)


class Timed:
    """A loader that notes what each step waits for it and what that costs."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.at = loader, 0
        self.waits: list[float] = []
        self.costs: list[float] = []
        self._in_thread = 0.0
        if hasattr(loader, "_read"):
            loader._read = self._timed(loader._read)

    def _timed(self, read: Any) -> Any:
        def reading(step: int) -> Any:
            started = thread_time()
            found = read(step)
            self._in_thread = thread_time() - started
            return found

        return reading

    def step(self, _: int) -> Sequence[Batch]:
        """The next step's batches, whatever the trainer's step is."""
        started, started_cpu = perf_counter(), thread_time()
        batches: Sequence[Batch] = self.loader.step(self.at)
        self.waits.append(perf_counter() - started)
        self.costs.append(thread_time() - started_cpu + self._in_thread)
        self.at += 1
        return batches

    def close(self) -> None:
        self.loader.close()


class TorchLoader:
    """`torch.utils.data.DataLoader` over the ids of one token file: samples one after the other in the text, shuffled."""

    def __init__(self, folder: Path, length: int, micro_batch_size: int, passes: int, workers: int) -> None:
        import torch
        from torch.utils.data import DataLoader, Dataset

        ids = np.memmap(folder / "train.bin", np.uint16, "r")

        class Samples(Dataset[Any]):
            def __len__(self) -> int:
                return (len(ids) - 1) // length

            def __getitem__(self, place: int) -> Any:
                tokens = torch.from_numpy(ids[place * length : place * length + length + 1].astype(np.int64))
                return tokens[:-1], tokens[1:]

        self._passes = passes
        loader = DataLoader(Samples(), micro_batch_size, shuffle=True, num_workers=workers, drop_last=True)
        self._batches: Iterator[Any] = iter(loader)

    def step(self, _: int) -> list[Batch]:
        from data_pipeline.read.loader import Batch

        return [Batch(*next(self._batches)) for _ in range(self._passes)]

    def close(self) -> None:
        del self._batches


def _measured(arguments: argparse.Namespace, sources: Sequence[Path], folder: Path) -> list[dict[str, Any]]:
    from data_pipeline.mix.mixture import training_samples
    from data_pipeline.read.loader import TrainLoader
    from pretrain.distributed.layout import Layout
    from pretrain.distributed.process import prepare_process
    from pretrain.distributed.rendezvous import open_layout

    mixed = [{"path": str(source), "weight": weight} for weight, source in enumerate(sources, start=1)]
    data = {
        "one": [f"--data.path={sources[0]}"],
        "mixture": ["--data.path=null", f"--data.sources={mixed}".replace("'", '"')],
    }
    configs = {name: load_config(arguments.config, given, CHECKS, world_size=1) for name, given in data.items()}
    training, length = configs["one"].training, configs["one"].data.sequence_length
    micro = training.micro_batch_size
    layout = Layout.from_environment()
    prepare_process(layout, deterministic=False)
    steps = TURN * arguments.turns
    with open_layout(layout):
        trainer = build(configs["one"], layout, folder / "run")
        trainer.loader.close()
        loaders = {
            name: Timed(TrainLoader(training_samples(config), training.global_batch_size, micro, 0, 1, steps + 1))
            for name, config in configs.items()
        }
        for name, workers in (("DataLoader, 1 worker", 1), ("DataLoader", 0)):
            loaders[name] = Timed(TorchLoader(sources[0], length, micro, training.global_batch_size // micro, workers))
        seconds = _take_turns(trainer, loaders, arguments.turns)
        for loader in loaders.values():
            loader.close()
        trainer.metrics.close()
    return [_row(name, loader, seconds[name]) for name, loader in loaders.items()]


def _take_turns(trainer: Any, loaders: dict[str, Timed], turns: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of each step of each loader."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    names = list(loaders)
    for turn in range(turns):
        for name in names if turn % 2 == 0 else reversed(names):
            trainer.loader = loaders[name]
            for _ in range(TURN):
                started, started_cpu = perf_counter(), process_time()
                trainer.advance()
                seconds[name].append((perf_counter() - started, process_time() - started_cpu))
    return seconds


def _row(name: str, loader: Timed, seconds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    counted = [number for number in range(len(seconds)) if number % TURN]
    columns = (*zip(*seconds, strict=True), loader.waits, loader.costs)
    step, step_cpu, wait, cost = ([1e3 * column[number] for number in counted] for column in columns)
    return {
        "loader": name,
        "steps": len(counted),
        "step_ms": median(step),
        "step_cpu_ms": median(step_cpu),
        "wait_ms": median(wait),
        "wait_ms_of_nine_in_ten": quantiles(wait, n=10)[-1],
        "wait_percent": 100 * median(wait) / median(step),
        "cpu_ms": median(cost),
        "cpu_percent": 100 * median(cost) / median(step_cpu),
    }
