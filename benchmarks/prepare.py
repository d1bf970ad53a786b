"""Memory and speed of launch/prepare.py on much text: `python benchmarks/prepare.py --gigabytes 3 --json prepare.json`.

The text is made of words with the frequencies of a natural language (Zipf's), most documents of a few hundred words, some of
a hundred thousand. A third of it is a plain .jsonl, a third a .jsonl.gz, a third parquet files. The command runs as a user
runs it; the memory of all its processes (private and shared pages once, PSS) is read ten times a second.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import gzip
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import psutil

from data_pipeline.prepare.minhash import LOWEST
from launch.common import number, output_file, run_command, whole_number

WORDS = 200_000
GROUP = 2000  # documents of a parquet row group


@cache
def vocabulary() -> np.ndarray:
    draw = np.random.default_rng(0)
    bounds = np.cumsum(draw.integers(2, 11, WORDS))
    letters = "".join(np.array(list("etaoinshrdlucmfwypvbgkjqxz"))[draw.zipf(1.3, bounds[-1]) % 26])
    return np.array([letters[start:stop] for start, stop in pairwise([0, *bounds])], dtype=object)


def documents(size: int, seed: int) -> Iterator[str]:
    """Texts of about `size` bytes in total."""
    draw, words = np.random.default_rng(seed), vocabulary()
    chances = 1 / np.arange(1, WORDS + 1)
    bounds = np.cumsum(chances / chances.sum())
    while size > 0:
        length = 100_000 if draw.random() < 1e-4 else int(draw.lognormal(5.5, 1)) + 5
        text = " ".join(words[np.minimum(np.searchsorted(bounds, draw.random(length)), WORDS - 1)])
        size -= len(text)
        yield text


def write_input(folder: Path, size: int) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    for seed, name in enumerate(("plain.jsonl", "packed.jsonl.gz")):
        path = folder / name
        with gzip.open(path, "wt", 1) if path.suffix == ".gz" else path.open("w") as file:
            for text in documents(size // 3, seed):
                file.write(json.dumps({"text": text}) + "\n")
    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(folder / "columns.parquet", schema) as writer:
        group: list[str] = []
        for text in documents(size // 3, 2):
            group.append(text)
            if len(group) == GROUP:
                writer.write_table(pyarrow.table({"text": group}, schema))
                group = []
        writer.write_table(pyarrow.table({"text": group}, schema))


def peak_memory(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end; most bytes that the process and its children held together."""
    return max(held_memory(process), default=0)


def held_memory(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """Until it ends, ten times a second the bytes that the process and its children hold together."""
    while process.poll() is None:
        held = 0
        try:
            parent = psutil.Process(process.pid)
            for one in [parent, *parent.children(recursive=True)]:
                held += one.memory_full_info().pss
        except psutil.Error:
            pass  # one has just ended
        yield held
        time.sleep(0.1)


def peaks(samples: Sequence[int], parts: int) -> list[float]:
    """The most in each of `parts` equal parts of the time, in MB."""
    bounds = [len(samples) * part // parts for part in range(parts + 1)]
    return [max(samples[start:stop], default=0) / 1e6 for start, stop in pairwise(bounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=number(0.001, 1000), default=3.0, metavar="X", help="of text (default: 3)")
    parser.add_argument("--workers", type=whole_number(1, 1024), default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--near-duplicates", type=number(LOWEST, 1), metavar="X", help="passed on (default: not)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="for input and output (default: temporary)")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        write_input(folder / "in", int(arguments.gigabytes * 1e9))
        command = [sys.executable, "launch/prepare.py", "--input", str(folder / "in"), "--output", str(folder / "out")]
        command += ["--deduplicate", "--workers", str(arguments.workers)]
        if arguments.near_duplicates is not None:
            command += ["--near-duplicates", str(arguments.near_duplicates)]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=sys.path[0], stdout=subprocess.DEVNULL)
        held = list(held_memory(process))
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"error: prepare.py ended with status {process.returncode}")
        figures = {
            "text, GB": arguments.gigabytes,
            "workers": arguments.workers,
            "peak memory of all processes, MB": max(held) / 1e6,
            "seconds": seconds,
            "MB/s": arguments.gigabytes * 1e3 / seconds,
        }
    for name, value in figures.items():
        print(f"{name:<40} {value:>10.2f}")
    if arguments.json:
        record: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(), "figures": figures}
        record["peak memory in each tenth of the time, MB"] = peaks(held, 10)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
