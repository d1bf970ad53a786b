"""What streaming costs a run: `python benchmarks/stream.py --json stream.json`.

Three figures: tokens that one worker reads and tokenizes in a second, by the clock and by its processor time, beside those that
a training step of the configuration takes; the share of a step for which training waits for its batch, once the workers are
ahead; and how long a stream takes to come back to a place behind so many GB of a .jsonl.zst.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import os
import platform
import tempfile
from statistics import mean, median
from time import perf_counter, process_time
from typing import Any

from configs.load import load_config
from configs.schema import Config
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.sources import find_sources
from launch.common import output_file, run_command, whole_number

WARMUP = 5  # steps in which the workers start and come ahead


def reading(config: Config, steps: int) -> dict[str, float]:
    """A rank that does nothing but ask for batches."""
    import psutil

    from data_pipeline.stream.loader import StreamLoader
    from data_pipeline.stream.text import StreamedText

    loader = StreamLoader(config, StreamedText.of(config.data), 0, 1)
    for step in range(WARMUP):
        loader.step(step)

    def processor() -> float:
        return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())

    started, used = perf_counter(), processor()
    for step in range(WARMUP, WARMUP + steps):
        loader.step(step)
    seconds, used = perf_counter() - started, processor() - used
    loader.close()
    tokens = steps * config.training.global_batch_size * config.data.sequence_length
    return {"tokens_per_second": tokens / seconds, "tokens_per_processor_second": tokens / used}


def training(config: Config, steps: int, folder: Path) -> dict[str, float]:
    """Steps of the run, in one process: their seconds, and those of waiting for the batch."""
    from pretrain.build import build_trainer, streamed_text
    from pretrain.distributed.layout import Layout
    from pretrain.distributed.process import prepare_process
    from pretrain.distributed.rendezvous import open_layout

    folder.mkdir()
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)})})
    layout = Layout.from_environment(config.parallel)
    prepare_process(layout, deterministic=True)
    with open_layout(layout):
        text = streamed_text(config)
        assert text is not None
        trainer = build_trainer(config.resolved(text.vocab_size, text.end_of_document), layout, text=text)
        trainer.hooks, trainer.progress.speaks = [], False
        loader = trainer.loader = Timed(trainer.loader)
        totals = []
        for _ in range(WARMUP + steps):
            started = perf_counter()
            trainer.advance()
            totals.append(perf_counter() - started)
        trainer.close()
    waits, totals = loader.waits[WARMUP:], totals[WARMUP:]
    return {
        "step_s": median(totals),
        "wait_s": median(waits),
        "wait_share": sum(waits) / sum(totals),
        "largest_wait_s": max(waits),
    }


class Timed:
    """A loader, and how long each of its steps took."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.waits = loader, list[float]()

    def step(self, step: int) -> Any:
        started = perf_counter()
        batches = self.loader.step(step)
        self.waits.append(perf_counter() - started)
        return batches

    def close(self) -> None:
        self.loader.close()


def resuming(config: Config, gigabytes: float, folder: Path) -> dict[str, float]:
    """Seconds, by the clock and of the processor, to the last document of a file with so much text."""
    import pyarrow

    from data_pipeline.stream.documents import documents
    from data_pipeline.stream.units import Share, find_units

    options, path = ReadOptions(), folder / "text.jsonl.zst"
    texts = [text for source in find_sources(config.data.stream.input) for text in source.documents(options)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts if isinstance(text, str)]
    size = count = 0
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        while size < gigabytes * 1e9:
            line = lines[count % len(lines)]
            file.write(line)
            size, count = size + len(line), count + 1
        file.write(lines[0])
    share = Share(tuple(find_units(config.data.stream.model_copy(update={"input": [str(path)]}))))
    next(documents(share, options))  # imports what reads
    started, used = perf_counter(), process_time()
    next(documents(share, options, 0, size, count))
    seconds = {"seconds": perf_counter() - started, "processor_seconds": process_time() - used}
    return {"text_gb": size / 1e9, "compressed_gb": path.stat().st_size / 1e9, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="configs/stream_cpu.yaml")
    parser.add_argument("--steps", type=whole_number(1), default=100, help="default: %(default)s")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="text in the .jsonl.zst; default: %(default)s")
    parser.add_argument("--json", type=output_file(".json"), help="write the figures there")
    arguments = parser.parse_args()
    config = load_config(arguments.config, [f"--training.steps={20 * arguments.steps}"], world_size=1)
    with tempfile.TemporaryDirectory() as scratch:
        figures = {
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {mean(os.getloadavg()):.1f}",
            "workers": config.data.stream.workers,
            "reading": reading(config, 10 * arguments.steps),
            "training": training(config, arguments.steps, Path(scratch, "run")),
            "resuming": resuming(config, arguments.gigabytes, Path(scratch)),
        }
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main, one_process=True)
