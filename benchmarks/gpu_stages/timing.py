"""Timing, and conditions of cases, for the stages of benchmarks/gpu.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from benchmarks.gpu_stages.stages import Options, SkippedError


def median_seconds(run: Callable[[], object], device: str, repeats: int, warmup: int = 2) -> float:
    """The median time of one run; on a GPU between two events of the stream, so that Python's own time hides behind it."""
    for _ in range(warmup):
        run()
    if device == "cpu":
        return median(_wall(run) for _ in range(repeats))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairs) / 1e3


def _wall(run: Callable[[], object]) -> float:
    started = perf_counter()
    run()
    return perf_counter() - started


def now(device: str) -> float:
    """The time when all that was started on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def need_gpu(options: Options) -> None:
    if options.device != "cuda":
        raise SkippedError("needs a GPU")


def need_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise SkippedError(f"{name} is not installed")
