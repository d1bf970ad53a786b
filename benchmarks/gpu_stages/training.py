"""Stage training: steps of the 1 B configuration by the project's own Trainer, on one device and on random tokens.

A step has two micro-batches of 8 × 2,048 tokens. Shared scores need head embeddings after the rotation, the configuration has
them before it. FLOPs executed are model/costs/flops.py's for the kernel that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_stages.stages import Case, Options, Row
from benchmarks.gpu_stages.timing import need_package, now
from benchmarks.gpu_stages.trainers import ENGINES, configuration, opened, profiled, trainer
from configs.schema import Config
from model.costs.flops import executed_flops_per_token, flops_per_token
from pretrain.report.metrics import memory_gib

ACCUMULATION, WARMUP, MEASURED = 2, 2, 3
EAGER = (
    ("mha", "sdpa"),
    ("mhe_add", "shared_scores"),
    ("mhe_add", "sdpa"),
    ("mhe_mul", "sdpa"),
    ("mqa", "sdpa"),
)
WAYS = (  # the most telling ones first, in case that time runs out; math, which stores all scores, may run out of memory
    *((*pair, "fsdp", False) for pair in EAGER),
    *((*pair, "fsdp", True) for pair in EAGER[:2]),
    *((*pair, "zero 1", False) for pair in EAGER),
    *((*pair, "fsdp", True) for pair in EAGER[2:]),
    ("mhe_add", "math", "fsdp", False),
)


def cases(options: Options) -> list[Case]:
    """All ways; in a rehearsal one that compiles and one on DeepSpeed, which take most of the time."""
    slow = {(engine, compiles) for _, _, engine, compiles in WAYS} - {("fsdp", False)}
    first = [next(way for way in WAYS if way[2:] == kind) for kind in slow]
    return [
        Case(f"{variant} by {kernel}, {engine}{', compile' if compiles else ''}", partial(measure, options, *way))
        for way in WAYS
        for variant, kernel, engine, compiles in [way]
        if not options.tiny or way in first or way[2:] not in slow
    ]


def configured(options: Options, variant: str, kernel: str, engine: str, compiles: bool) -> Config:
    fields = {"model.attention": variant, "model.attention_kernel": kernel, **ENGINES[engine]}
    fields |= {"training.compile": True} if compiles else {}
    return configuration(options, fields, ACCUMULATION, WARMUP + MEASURED + 1)


def measure(options: Options, variant: str, kernel: str, engine: str, compiles: bool) -> Iterator[Row]:
    if engine.startswith("zero"):
        need_package("deepspeed")
    config = configured(options, variant, kernel, engine, compiles)
    name = f"{variant}-{kernel}-{engine}-{compiles}"
    with rehearsed_compiler(options.tiny):
        yield {"variant": variant, "kernel": kernel, "engine": engine, "compile": compiles} | steps(options, config, name)


def steps(options: Options, config: Config, name: str) -> Row:
    """Figures of a configuration: medians over MEASURED steps, then one step under the profiler."""
    with opened(config) as layout, trainer(config, layout, options.folder / name) as run:
        seconds = [_seconds(run.advance, options.device) for _ in range(WARMUP + MEASURED)]
        peak = memory_gib(layout.device)
        top = profiled(run.advance, options.device, 5)
        tokens_per_second = run.throughput.tokens_per_second(median(seconds[WARMUP:]))
        peak_flops = run.throughput.peak_flops
        parameters = sum(parameter.numel() for parameter in run.backend.module.parameters())
    length, model = config.data.sequence_length, config.model
    shares = model.attention_kernel == "shared_scores"
    counted = flops_per_token(model, length)
    executed = None if model.attention_kernel == "math" else executed_flops_per_token(model, length, shares)
    row: Row = {"parameters": parameters, "first_s": seconds[0], "median_s": median(seconds[WARMUP:])}
    row |= {"tokens_per_second": tokens_per_second, "model_flops_per_second": tokens_per_second * counted}
    row["executed_flops_per_second"] = None if executed is None else tokens_per_second * executed
    row["mfu"] = None if peak_flops is None else tokens_per_second * counted / peak_flops
    return row | {"peak_gib": peak, "top": top, "graphs": compiled_graphs() if config.training.compile else None}


def _seconds(step: Callable[[], object], device: str) -> float:
    started = now(device)
    step()
    return now(device) - started


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process; as many as a block has parts, if blocks share them."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def rehearsed_compiler(tiny: bool) -> Iterator[None]:
    """A rehearsal traces and differentiates graphs but generates no code, which takes half a minute on a CPU."""
    original = torch.nn.Module.compile

    def trace(module: Any, **options: Any) -> None:
        original(module, **{"backend": "aot_eager", **options})

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # a row's graphs are its own
    if tiny:
        torch.nn.Module.compile = trace  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.nn.Module.compile = original  # type: ignore[method-assign]
