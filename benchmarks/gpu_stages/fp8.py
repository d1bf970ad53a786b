"""Stage fp8: the rate of float8 matrix products, and steps of the 1 B configuration in fp8 beside bf16, from the same start."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch

from benchmarks.gpu_stages.stages import Case, Options, Row
from benchmarks.gpu_stages.timing import median_seconds, need_gpu, need_package, now
from benchmarks.gpu_stages.trainers import ENGINES, configuration, losses, opened, trainer

STEPS, WARMUP = 5, 2


def cases(options: Options) -> list[Case]:
    steps = [Case(f"steps{', compile' if compiles else ''}", partial(train, options, compiles)) for compiles in (True, False)]
    return [Case("matmul", partial(matmul, options)), *steps]


def matmul(options: Options) -> Iterator[Row]:
    """One scale for each matrix; the second is stored by columns, as the units want it."""
    need_gpu(options)
    side = 8192
    first, second = (torch.randn(side, side, device=options.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=options.device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(first, second.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    seconds = median_seconds(product, options.device, 20, warmup=5)
    yield {"side": side, "median_s": seconds, "flops_per_second": 2 * side**3 / seconds}


def train(options: Options, compiles: bool) -> Iterator[Row]:
    """A step has one micro-batch. Both precisions start from the same weights and read the same tokens."""
    need_gpu(options)
    need_package("torchao")
    found = {}
    for precision in ("bf16", "fp8"):
        fields = {**ENGINES["fsdp"], "model.attention": "mhe_add", "training.precision": precision}
        config = configuration(options, {**fields, "training.compile": compiles}, 1, STEPS)
        folder = options.folder / f"{precision}-{compiles}"
        with opened(config) as layout, trainer(config, layout, folder) as run:
            times = []
            for _ in range(STEPS):
                started = now(options.device)
                run.advance()
                times.append(now(options.device) - started)
            seconds = median(times[WARMUP:])
            loss = losses(folder)[-1][1]
            found[precision] = {
                "median_s": seconds,
                "tokens_per_second": run.throughput.tokens_per_second(seconds),
                "loss": loss,
            }
    bf16, fp8 = found["bf16"], found["fp8"]
    yield {"compile": compiles, **fp8, "bf16_tokens_per_second": bf16["tokens_per_second"], "bf16_loss": bf16["loss"]}
