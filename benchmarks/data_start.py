"""How long a run takes to its first batch, on generated folders of a billion tokens; and `prepare.py check` of them.

Each start is a process of its own that does what launch/pretrain.py does with its data: check the configuration, open the
sources, write the index of the epoch if there is none, read the first batch. Seconds count from the start of the process;
`cpu` are its CPU seconds until then, which depend less on other work of the machine. `tiny` is the same on a folder of a
million tokens: what Python, torch and megatron-core take.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import time
from statistics import median
from typing import Any

from benchmarks.generated_tokens import tokenizer_folder, write_generated
from configs.load import load_config
from configs.schema import Config
from launch.common import CHECKS, whole_number

ROOT = Path(__file__).resolve().parent.parent
SOURCES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=whole_number(10**6), default=10**9, metavar="N", help="default: a billion")
    parser.add_argument("--rounds", type=whole_number(1), default=3, metavar="N", help="starts of each kind (default: 3)")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="for the generated tokens (default: temporary)")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        small = tokenizer_folder(folder)
        for name, parts, tokens in (("tiny", 1, 10**6), ("one", 1, arguments.tokens), ("mixture", SOURCES, arguments.tokens)):
            sources = [folder / name / f"part{number}" for number in range(parts)]
            for number, source in enumerate(sources):
                write_generated(source, tokens // parts, small, seed=number)
            for packing in ("concatenate", "best_fit"):
                found += [
                    {"data": name, "tokens": tokens, "packing": packing, **row} for row in _starts(sources, packing, arguments)
                ]
            if name != "tiny":
                found.append({"data": name, "tokens": tokens, "what": "prepare.py check", **_check(sources)})
            shutil.rmtree(folder / name)
    return found


def _starts(sources: list[Path], packing: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of starts without and with the index of the epoch, in seconds at each mark."""
    times: dict[str, list[dict[str, float]]] = {"first start": [], "next start": []}
    for _ in range(arguments.rounds):
        for source in sources:
            shutil.rmtree(source / "index", ignore_errors=True)
        for marks in times.values():
            marks.append(_start(sources, packing))
    return [
        {"what": name, **{key: median(start[key] for start in starts) for key in starts[0]}} for name, starts in times.items()
    ]


def _start(sources: list[Path], packing: str) -> dict[str, float]:
    """Seconds and CPU seconds at each mark."""
    command = [sys.executable, __file__, packing, *map(str, sources)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    marks: dict[str, float] = json.loads(done.stdout)
    return marks


def _check(sources: list[Path]) -> dict[str, float]:
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "launch/prepare.py", "check", *map(str, sources)]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"s": seconds, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def to_first_batch(packing: str, sources: list[str]) -> None:
    """Do it, and print the seconds at each mark since this process began."""
    import psutil

    began, marks = psutil.Process().create_time(), dict[str, float]()

    def mark(name: str) -> None:
        marks[f"{name}, s"], marks[f"{name}, cpu"] = time.time() - began, time.process_time()

    given = json.dumps([{"path": source, "weight": 1} for source in sources])
    overrides = ["--data.path=null", f"--data.sources={given}", f"--data.packing={packing}", "--data.sequence_length=1024"]
    config: Config = load_config("configs/quickstart_cpu.yaml", overrides, CHECKS, world_size=1)
    mark("configuration checked")
    from data_pipeline.mix.mixture import training_samples, training_sources
    from data_pipeline.read.loader import TrainLoader

    mark("torch imported")
    opened = training_sources(config)
    mark("sources opened")
    training = config.training
    sizes = (training.global_batch_size, training.micro_batch_size, 0, 1)
    with TrainLoader(training_samples(config, opened), *sizes, steps=training.steps) as loader:
        loader.step(0)
        mark("first batch")
    print(json.dumps(marks))


if __name__ == "__main__":
    to_first_batch(sys.argv[1], sys.argv[2:])
