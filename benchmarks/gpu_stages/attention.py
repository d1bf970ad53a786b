"""Stage attention: one layer without projections, at length 4096 and width 4096, by every kernel that there is.

Inputs, contenders and what a run includes are those of benchmarks/attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.attention_contenders import Contender, NotHereError, Shape, build, refuse_fallback
from benchmarks.gpu_stages.stages import Case, Options, Row, SkippedError
from benchmarks.gpu_stages.timing import median_seconds
from model.costs.flops import attention_cost, attention_pairs

CONTENDERS = (
    ("mha", "sdpa_flash"),
    ("mha", "sdpa_cudnn"),
    ("mqa", "sdpa"),
    ("mhe_add", "sdpa"),
    ("mhe_add", "shared_scores"),
    ("mhe_mul", "sdpa"),
    ("mha", "flex"),  # compiled, so these come last
    ("mhe_add", "flex"),
)


def cases(options: Options) -> list[Case]:
    heads = (2, 4) if options.tiny else (64, 128, 256)
    width, tokens, batch = (16, 64, 1) if options.tiny else (4096, 4096, 2)
    return [
        Case(
            f"{variant} by {kernel}, {number} heads",
            partial(measure, variant, kernel, Shape(number, width, tokens, batch, "bfloat16", "none", True, options.device)),
        )
        for variant, kernel in CONTENDERS
        for number in heads
    ]


def measure(variant: str, kernel: str, shape: Shape) -> Iterator[Row]:
    """A row for each pass."""
    if shape.device == "cpu" and kernel == "flex":
        raise SkippedError("needs a GPU: it has no backward pass on CPUs")
    try:
        contender = build(variant, kernel, shape)
    except NotHereError as why:
        raise SkippedError(f"needs a GPU: {why}") from None
    for which in contender.passes:
        seconds = median_seconds(partial(contender.once, which), shape.device, 2 if shape.device == "cpu" else 15, warmup=3)
        refuse_fallback(kernel, shape.device, shape.dtype, shape.head_dim)
        peak = None if shape.device == "cpu" else contender.cuda_peak_bytes(which)
        yield figures(contender, which, seconds) | {"peak_bytes": peak}


def figures(contender: Contender, which: str, seconds: float) -> Row:
    """FLOPs are the useful ones, of the causal half (model/costs/flops.py)."""
    shape = contender.shape
    pairs = attention_pairs(shape.tokens, shape.causal) * shape.batch
    flops, _ = attention_cost(contender.config, pairs, which == "fwd_bwd", contender.kernel == "shared_scores")
    row = {"variant": contender.variant, "kernel": contender.kernel, "pass": which, "heads": shape.heads}
    row |= {"head_dim": shape.head_dim, "width": shape.width, "tokens": shape.tokens, "batch": shape.batch}
    return row | {"median_s": seconds, "flops": flops, "flops_per_second": flops / seconds}
