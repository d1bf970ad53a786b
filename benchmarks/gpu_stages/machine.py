"""Stage machine: what runs here, and what the device reaches in copies and matrix products."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import partial
from importlib import metadata

import torch

from benchmarks.gpu_stages.stages import Case, Options, Row
from benchmarks.gpu_stages.timing import median_seconds, nvidia_smi
from pretrain.hardware import peak_tflops
from pretrain.report.devices import device_name

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "megatron-core", "torchao")


def cases(options: Options) -> list[Case]:
    sides = (256,) if options.tiny else (4096, 8192, 16384)
    products = [Case(f"matmul {side}", partial(matmul, options, side)) for side in sides]
    return [Case("software", partial(software, options)), Case("copy", partial(copy, options)), *products]


def software(options: Options) -> Iterator[Row]:
    device = torch.device(options.device)
    row: Row = {"device": device_name(device), "python": platform.python_version(), "cuda": torch.version.cuda}
    row["peak_tflops"] = peak_tflops(row["device"])
    if options.device == "cuda":
        facts = torch.cuda.get_device_properties(device)
        row |= {"memory_bytes": facts.total_memory, "processors": facts.multi_processor_count}
        row["driver"] = nvidia_smi("driver_version,clocks.max.sm,power.limit")
        row |= {"capability": list(torch.cuda.get_device_capability(device)), "cudnn": torch.backends.cudnn.version()}
    yield row | {"packages": {name: found for name in PACKAGES if (found := version(name)) is not None}}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def copy(options: Options) -> Iterator[Row]:
    """Bytes read and written by a second, from memory to memory of the device."""
    count = 2**20 if options.tiny else 2**30
    source = torch.zeros(count, dtype=torch.bfloat16, device=options.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), options.device, 5 if options.tiny else 20)
    moved = 2 * source.numel() * source.element_size()
    yield {"moved_bytes": moved, "median_s": seconds, "bytes_per_second": moved / seconds}


def matmul(options: Options, side: int) -> Iterator[Row]:
    """A square product of bf16 numbers, of unit variance: zeros would let a GPU clock higher."""
    draw = torch.Generator(options.device).manual_seed(0)
    first, second = (torch.randn(side, side, dtype=torch.bfloat16, device=options.device, generator=draw) for _ in range(2))
    out = torch.empty_like(first)
    seconds = median_seconds(lambda: torch.mm(first, second, out=out), options.device, 3 if options.tiny else 20, warmup=5)
    yield {"side": side, "median_s": seconds, "flops_per_second": 2 * side**3 / seconds}
