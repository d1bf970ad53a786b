"""What each way of packing costs and wastes, on documents of natural lengths and on drawn ones.

English: the help topics and docstrings of the Python on this machine, as documents. Code: the files of its standard library.
Drawn: log-normal with a median of 403 tokens and a mean of about 740, as web pages have. Natural texts are measured with a
tokenizer of their own. `padding_percent` are places that hold no token of a text, `left_out_percent` tokens at the end of an
epoch that no sample has, `split_percent` documents that are in more than one sample.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.generated_tokens import drawn_lengths
from benchmarks.texts import prose
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.read.bounds import Bounds
from data_pipeline.read.manifest import read_manifest
from data_pipeline.read.pack import packed_order, piece_counts, plan, sample_count
from launch.common import whole_number

LENGTHS = (512, 2048)  # of samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=whole_number(1), default=10**9, help="drawn tokens (default: a billion)")
    parser.add_argument("--megabytes", type=whole_number(1), default=8, help="of English (default: 8)")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        documents = {
            "English": natural_lengths(_written(folder / "texts", prose(arguments.megabytes * 10**6)), folder / "english"),
            "code": natural_lengths("stdlib", folder / "code"),
            "drawn": np.random.default_rng(1).permutation(drawn_lengths(arguments.tokens, seed=0)),
        }
    return [
        {"documents": name, "count": len(lengths), "tokens": int(lengths.sum(dtype=np.int64)), "sample": sample, **row}
        for name, lengths in documents.items()
        for sample in LENGTHS
        for row in (concatenated(lengths, sample), packed(lengths, sample))
    ]


def _written(folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:06}.txt").write_text(text, encoding="utf-8", errors="replace")
    return str(folder)


def natural_lengths(source: str, output: Path) -> np.ndarray:
    """The lengths of the documents of an input, in tokens."""
    prepare(PrepareOptions((source,), output, 8192, split=(1, 0, 0)))
    return np.array(Bounds.of(output / "train.idx", read_manifest(output).splits["train"].documents).lengths)


def concatenated(lengths: np.ndarray, sample: int) -> dict[str, Any]:
    """`concatenate` and `documents`: the text in samples one after the other, here in the given order."""
    ends = lengths.cumsum(dtype=np.int64)
    used = (int(ends[-1]) - 1) // sample * sample
    first, last = (ends - lengths) // sample, (ends - 1) // sample
    return {
        "packing": "concatenate, documents",
        "padding_percent": 0.0,
        "left_out_percent": 100 * (1 - used / int(ends[-1])),
        "split_percent": 100 * float((first != last).mean()),
    }


def packed(lengths: np.ndarray, sample: int) -> dict[str, Any]:
    """`best_fit`, with what its plan and the index of an epoch take."""
    started = process_time()
    moves = plan(piece_counts(lengths, sample), sample)
    planned = process_time()
    packed_order(lengths, sample, moves, seed=1)
    ordered = process_time()
    tokens, places = int(lengths.sum(dtype=np.int64)), sample_count(moves, sample) * sample
    return {
        "packing": "best_fit",
        "padding_percent": 100 * (places - tokens) / places,
        "left_out_percent": 0.0,
        "split_percent": 100 * float((lengths > sample).mean()),
        "plan_s": planned - started,
        "index_s": ordered - planned,
    }
