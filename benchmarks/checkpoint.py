"""Time and memory of checkpoints: `python benchmarks/checkpoint.py --json checkpoint.json`.

Each size of a model is saved by two processes (FSDP), with and without `checkpoint.asynchronous` in turns, and read back by
other layouts, in new processes. The state has three float32 numbers a parameter, random ones: zeros would compress, and AdamW's
are zeros before the first step.

    written   seconds in which training waits: `synchronous` for a whole save, `stall` of an asynchronous one, for the copy and
              for putting it in place; `ratio` is stall / synchronous. Medians of the rounds after the first, which allocates.
    read      seconds of verifying all files and of loading; `peak` is the largest anonymous memory while a rank reads beyond
              what its engine had, plus its own state, over its own state; of the rank where it is largest. Mapped files do not
              count: the system drops their pages when it needs memory. Nor does what ZeRO 1 and 2 do then and after every
              step, the gathering of the weights, for which gloo takes a copy of them.

`seconds_per_gb` is time over the bytes of the whole checkpoint. A `ratio` above 0.1 of the largest size, or a `peak` above
1.3, is exit status 1.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch

from benchmarks.arguments import numbers
from benchmarks.ranks import one_of, run_ranks
from configs.load import load_config
from configs.schema import Config
from launch.common import output_file, run_command, whole_number

if TYPE_CHECKING:
    from pretrain.checkpoints.state import State

WRITERS = 2
READERS = {
    "FSDP 2": (2, ("--backend=fsdp",)),
    "ZeRO 1 × 4": (4, ("--parallel.zero_stage=1",)),
    "ZeRO 3 × 2": (2, ("--parallel.zero_stage=3",)),
    "1 process": (1, ("--parallel.zero_stage=0",)),
}
LAYERS = "1,3,7"
STALL, PEAK = 0.1, 1.3  # limits
SETTINGS = """
run: {{folder: {folder}}}
data: {{path: unused, sequence_length: 32}}
model: {{attention: mha, hidden_size: {hidden}, num_layers: {layers}, num_heads: 10, vocab_size: 1024}}
training: {{steps: 1000, global_batch_size: 4, micro_batch_size: 1}}
"""


@dataclass(frozen=True)
class Written:
    layers: int
    megabytes: float  # of the checkpoint
    rounds: int
    synchronous: float
    stall: float
    ratio: float
    seconds_per_gb: float


@dataclass(frozen=True)
class Read:
    layers: int
    megabytes: float
    layout: str
    verify: float
    load: float
    seconds_per_gb: float
    peak: float


def configuration(folder: Path, layers: int, hidden: int, fields: Sequence[str], ranks: int) -> Config:
    path = folder / f"run_{os.getpid()}.yaml"  # each rank's own
    path.write_text(SETTINGS.format(folder=folder / "run", layers=layers, hidden=hidden), encoding="utf-8")
    return load_config(path, fields, world_size=ranks).resolved(1024)


def own_bytes(state: "State") -> int:
    return sum(part.tensor.nbytes for part in state.parts)


def write(rank: int, port: int, folder: Path, layers: int, hidden: int, rounds: int) -> None:
    """Save by turns; the first rank writes the row."""
    from pretrain.build import make_backend
    from pretrain.checkpoints.saver import Saver
    from pretrain.checkpoints.store import CheckpointStore
    from pretrain.distributed.collectives import barrier

    config = configuration(folder, layers, hidden, ["--backend=fsdp"], WRITERS)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with one_of(WRITERS, rank, port, config.parallel) as layout:
        state, store = make_backend(config, layout).state(), CheckpointStore(Path(config.run.folder))
        for part in state.parts:
            part.tensor.uniform_()
        saver = Saver(store, layout, config, "d" * 64, "{}")
        for number in range(rounds):
            for asynchronous in (False, True):
                step = 2 * number + asynchronous
                barrier()
                started = time.perf_counter()
                saver.begin(step, state, waits=not asynchronous)
                stall = time.perf_counter() - started
                while asynchronous and not saver.written:  # training goes on
                    time.sleep(0.01)
                barrier()
                resumed = time.perf_counter()
                saver.finish()
                saver.clear_old()
                seconds[asynchronous].append(stall + time.perf_counter() - resumed)
        saver.close()
    if rank == 0:
        size = sum(path.stat().st_size for path in store.path(step).rglob("*") if path.is_file()) / 1e6
        synchronous, asynchronous_stall = (median(seconds[kind][1:]) for kind in (False, True))
        figures = (rounds - 1, synchronous, asynchronous_stall, asynchronous_stall / synchronous, synchronous / size * 1e3)
        (folder / "written.json").write_text(json.dumps(asdict(Written(layers, size, *figures))), encoding="utf-8")


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """The most `anonymous_memory` of the block beyond that at its start."""
    start, most, ended = anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.002):
            most = max(most, anonymous_memory() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most
    finally:
        ended.set()
        thread.join()


def read(rank: int, port: int, folder: Path, layers: int, hidden: int, name: str) -> None:
    """Verify and load; the first rank writes the row."""
    from pretrain.build import make_backend
    from pretrain.checkpoints.resume import Resumer
    from pretrain.checkpoints.store import CheckpointStore
    from pretrain.distributed.collectives import barrier, gather_objects

    ranks, fields = READERS[name]
    config = configuration(folder, layers, hidden, fields, ranks)
    with one_of(ranks, rank, port, config.parallel) as layout:
        resumer = Resumer(CheckpointStore(Path(config.run.folder)), layout, config, "d" * 64, "{}")
        barrier()
        started = time.perf_counter()
        start = resumer.find("auto")
        verified = time.perf_counter() - started
        assert start is not None
        backend = make_backend(config, layout, start.folder)
        own = own_bytes(backend.state())
        peaks: list[float] = []

        def load(read: Callable[["State"], None], state: "State") -> None:
            with peak_memory() as peak:
                read(state)
            peaks.append((peak() + own) / own)

        barrier()
        started = time.perf_counter()
        resumer.restore(start, lambda read: backend.load_state(partial(load, read)))
        loaded = time.perf_counter() - started
        peaks = gather_objects(peaks[0])
    if rank == 0:
        size = json.loads((folder / "written.json").read_text(encoding="utf-8"))["megabytes"]
        row = Read(layers, size, name, verified, loaded, (verified + loaded) / size * 1e3, max(peaks))
        (folder / "read.json").write_text(json.dumps(asdict(row)), encoding="utf-8")


def measure(layers: int, hidden: int, rounds: int, folder: Path) -> Iterator[Written | Read]:
    """The rows of one size of model."""
    run_ranks(write, WRITERS, folder, layers, hidden, rounds)
    yield Written(**json.loads((folder / "written.json").read_text(encoding="utf-8")))
    for name, (ranks, _) in READERS.items():
        run_ranks(read, ranks, folder, layers, hidden, name)
        yield Read(**json.loads((folder / "read.json").read_text(encoding="utf-8")))


def line(row: Written | Read) -> str:
    start = f"{row.layers:>6}  {row.megabytes:>7,.0f} MB  "
    if isinstance(row, Written):
        times = f"synchronous {row.synchronous:.3f} s, stall {row.stall:.3f} s ({row.ratio:.1%})"
        return f"{start}saved by FSDP 2      {times}, {row.seconds_per_gb:.2f} s/GB"
    times = f"verify {row.verify:.3f} s, load {row.load:.3f} s, {row.seconds_per_gb:.2f} s/GB"
    return f"{start}read by {row.layout:<12} {times}, peak {row.peak:.2f} × own state"


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=LAYERS, help=f"sizes: layers of the model, separated by commas (default: {LAYERS})")
    parser.add_argument("--hidden", type=whole_number(10), default=640, help="width of the model (default: 640)")
    parser.add_argument("--rounds", type=whole_number(2), default=6, help="saves of each kind, without the first (default: 6)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary folder)")
    parser.add_argument("--json", type=output_file(".json"), help="write the rows to this file, one by one")
    arguments = parser.parse_args()
    rows: list[Written | Read] = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for number, layers in enumerate(numbers(arguments.layers, "layers")):
            own = Path(folder) / str(number)
            own.mkdir()
            for row in measure(layers, arguments.hidden, arguments.rounds, own):
                rows.append(row)
                print(line(row), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    largest = [row for row in rows if isinstance(row, Written)][-1]
    missed = largest.ratio > STALL or any(row.peak > PEAK for row in rows if isinstance(row, Read))
    return 1 if missed else None


if __name__ == "__main__":
    run_command(main)
