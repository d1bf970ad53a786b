"""Speed of encoding and of all of prepare, in MB per CPU second, which other work on the machine hardly changes.

Contenders alternate; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import tokenizers

from benchmarks.texts import prose
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.tokenizer import Tokenizer, train
from launch.common import whole_number

VOCAB_SIZE = 16384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=whole_number(1), default=8, help="size of the text (default: 8)")
    parser.add_argument("--rounds", type=whole_number(1), default=5, help="rounds of each contender (default: 5)")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    documents = prose(arguments.megabytes * 1_000_000)
    figures = encoding_speeds(documents, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        figures |= prepare_speeds(documents, Path(folder), min(3, arguments.rounds))
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    return [{"what": name, "value": value, "text_megabytes": megabytes} for name, value in figures.items()]


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
