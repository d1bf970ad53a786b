"""Speed of the data pipeline: encoding, all of prepare, reading batches. `python benchmarks/data.py --json data.json`.

The text is English found on any machine: Python's help topics and the docstrings of its standard library and of the installed
packages (prose with some examples of code). Contenders alternate; figures are medians. Encoding and prepare are measured in CPU
seconds, which other work on the machine hardly changes, the loader in wall-clock time.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import ast
import json
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter, process_time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for either library

import numpy as np
import tokenizers

from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.tokenizer import Tokenizer, train
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import TrainLoader
from data_pipeline.read.pack import packed_order, piece_counts, plan, sample_count
from launch.common import output_file, run_command

VOCAB_SIZE = 16384
PACKED_LENGTH = 2048
SEQUENCE_LENGTH, GLOBAL_BATCH, MICRO_BATCH, STEPS = 1024, 32, 8, 40


def prose(limit: int) -> list[str]:
    """Documents with at least `limit` characters in total, if this machine has them."""
    from pydoc_data.topics import topics

    documents = list(topics.values())
    size = sum(map(len, documents))
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for file in sorted(Path(folder).rglob("*.py")):
            found = list(_docstrings(file)) if size < limit and "test" not in str(file) else []
            if found:
                documents.append("\n\n".join(found))
                size += len(documents[-1])
    return documents


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 200:  # leaves out one-liners
                yield text


def encoding_speeds(documents: list[str], rounds: int) -> dict[str, float]:
    """MB per CPU second of each library with the same vocabulary, alternating."""
    content = train(documents, VOCAB_SIZE)
    ours, theirs = Tokenizer(content, "trained"), tokenizers.Tokenizer.from_str(content)
    if ours.engine != "tiktoken":
        raise SystemExit("error: tiktoken does not give the ids of tokenizers here")
    megabytes = sum(len(text.encode()) for text in documents) / 1e6

    def with_tiktoken() -> None:
        for text in documents:
            ours.encode_array(text)

    def with_tokenizers() -> None:
        theirs.encode_batch_fast(documents, add_special_tokens=False)

    contenders: dict[str, Callable[[], None]] = {"tiktoken": with_tiktoken, "tokenizers": with_tokenizers}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started = process_time()
            run()
            speeds[name].append(megabytes / (process_time() - started))
    return {f"encode, {name}, MB/s per core": median(values) for name, values in speeds.items()}


def prepare_speeds(documents: list[str], folder: Path, rounds: int) -> dict[str, float]:
    """MB per CPU second from a .jsonl to the finished folder."""
    source = folder / "prose.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    speeds: dict[str, list[float]] = {"with training a tokenizer": [], "with a given tokenizer": []}
    for _ in range(rounds):
        for name, values in speeds.items():
            given = folder / "data" / "tokenizer.json" if name == "with a given tokenizer" else None
            output = folder / ("data" if given is None else "again")
            started = process_time()
            prepare(PrepareOptions((str(source),), output, VOCAB_SIZE, given, overwrite=True))
            values.append(megabytes / (process_time() - started))
    return {f"prepare, {name}, MB/s per core": median(values) for name, values in speeds.items()}


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


def packing_figures(tokens: int) -> dict[str, float]:
    """Best-fit packing of drawn document lengths, log-normal with a median of 403 tokens and a mean of about 740."""
    lengths = np.random.default_rng(0).lognormal(6, 1.1, tokens // 600).astype(np.int32) + 1
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(dtype=np.int64), tokens))]
    started = process_time()
    moves = plan(piece_counts(lengths, PACKED_LENGTH), PACKED_LENGTH)
    planned = process_time()
    packed_order(lengths, PACKED_LENGTH, moves, seed=1)
    places = sample_count(moves, PACKED_LENGTH) * PACKED_LENGTH
    label = f"best fit of {len(lengths):,} documents, {tokens:,} tokens, {PACKED_LENGTH} a sample"
    return {
        f"{label}: plan, s": planned - started,
        f"{label}: index of an epoch, s": process_time() - planned,
        f"{label}: padding, %": 100 * (1 - int(lengths.sum(dtype=np.int64)) / places),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the figures there, too")
    parser.add_argument("--megabytes", type=int, default=8, help="size of the text (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contender (default: 5)")
    parser.add_argument("--packed-tokens", type=int, default=10**8, help="tokens of the packing (default: 100,000,000)")
    arguments = parser.parse_args()
    documents = prose(arguments.megabytes * 1_000_000)
    figures: dict[str, float] = {"text, MB": sum(len(text.encode()) for text in documents) / 1e6}
    figures |= packing_figures(arguments.packed_tokens)
    figures |= encoding_speeds(documents, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        figures |= prepare_speeds(documents, Path(folder), min(3, arguments.rounds))
        figures |= loader_speeds(Path(folder))
    for name, value in figures.items():
        print(f"{name:<48} {value:>10.3f}")
    if arguments.json:
        record = {"machine": platform.platform(), "cores": os.cpu_count(), "rounds": arguments.rounds, "figures": figures}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
