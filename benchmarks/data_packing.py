"""What packing costs and wastes."""

from __future__ import annotations

import argparse
from time import process_time
from typing import Any

import numpy as np

from data_pipeline.read.pack import packed_order, piece_counts, plan, sample_count
from launch.common import whole_number

PACKED_LENGTH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packed-tokens", type=whole_number(1), default=10**8, help="drawn tokens (default: 100,000,000)")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"what": name, "value": value} for name, value in packing_figures(arguments.packed_tokens).items()]


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
