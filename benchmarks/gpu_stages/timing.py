"""Timing, and conditions of cases, for the stages of benchmarks/gpu.py."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from benchmarks.gpu_stages.stages import Options, SkippedError

CACHE_BYTES = 2**28  # more than any GPU's L2 cache
CYCLES_PER_SECOND = 3e9  # GPUs run at less, so the filler lasts longer
LONGEST_FILLER = 0.05  # seconds


def median_seconds(run: Callable[[], object], device: str, repeats: int, warmup: int = 2) -> float:
    """The median time of one run; on a GPU between two events of the stream.

    Before each run the GPU gets a filler that lasts at least twice as long as Python needs to launch the run, so that kernels
    shorter than their launch do not wait for it between the events. Then the L2 cache is overwritten.
    """
    for _ in range(warmup):
        run()
    if device == "cpu":
        return median(_wall(run) for _ in range(repeats))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    filler, cache = _filler_cycles(run), cache_buffer(device)
    torch.cuda.synchronize()
    for start, end in pairs:
        torch.cuda._sleep(filler)
        cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairs) / 1e3


def cache_buffer(device: str) -> torch.Tensor:
    """Memory that fills the L2 cache when it is written."""
    return torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)


def _filler_cycles(run: Callable[[], object]) -> int:
    """Twice the time that Python needs to launch one run, in cycles of the GPU."""
    torch.cuda.synchronize()
    launch = _wall(run)
    return int(min(2 * launch, LONGEST_FILLER) * CYCLES_PER_SECOND)


def _wall(run: Callable[[], object]) -> float:
    started = perf_counter()
    run()
    return perf_counter() - started


def now(device: str) -> float:
    """The time when all that was started on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def nvidia_smi(fields: str) -> str | None:
    """What nvidia-smi says, a line for each GPU; a container may lack it."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def need_gpu(options: Options) -> None:
    if options.device != "cuda":
        raise SkippedError("needs a GPU")


def need_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise SkippedError(f"{name} is not installed")
