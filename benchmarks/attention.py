"""Attention of one layer, without projections: `python benchmarks/attention.py --json attention.json --plot docs`.

Variants × kernels × heads × lengths, interleaved in one process: every round runs each contender once, and one square matrix
product whose rate is taken as the machine's peak. Figures are medians over the rounds after the first. Each contender starts
from its projections of hidden states (and head embeddings) and ends with its concatenated heads, as the output projection reads
them; latents are expanded within. A variant may have fields of its own: mhe_add:num_seeds=4. Before anything is timed, its
results and gradients (at no more than 640 tokens) must equal those of the formula.

JSON: a list of rows with variant, kernel (and what auto has `chosen`), pass = fwd | fwd_bwd, heads, head_dim, width, tokens,
batch, dtype, position, causal, device, threads, median_s, min_s, runs; peak_bytes, the most memory held beyond the inputs;
flops and exps, the useful ones by model/costs/flops.py, causal half; share_of_matmul_peak = flops / median_s
over the peak. A contender that is wrong or fails while it is timed ends no other: its row has `error` instead of figures.

Kernels: auto, math, sdpa, shared_scores as in model.attention_kernel; sdpa_expanded materializes K and V of all heads (naive
MHE); flex is torch's FlexAttention, compiled; on CUDA sdpa_flash, sdpa_cudnn and sdpa_efficient force a backend. `all`:
whatever runs here. `speed` in the table is relative to the first row of the same size and pass: `mha` by auto or sdpa is the
usual alternative.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import gc
import json
import os
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.arguments import VARIANTS_HELP, names, numbers, variants_of
from benchmarks.attention_contenders import (
    KERNELS,
    TOLERANCE,
    Contender,
    Shape,
    contenders,
    failed,
    one_line,
    upstream,
)
from configs.errors import UserError
from launch.common import output_file, output_folder, run_command
from model.costs.flops import attention_cost, attention_pairs


def peak_bytes(contender: Contender, which: str) -> int:
    """Peak memory of one run beyond its inputs, including the kernel's scratch memory."""

    from model.attention.shared_scores.blocks import SPACE

    contender.once(which)
    SPACE.buffers.clear()
    if contender.shape.device == "cuda":
        return contender.cuda_peak_bytes(which)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender.once(which)
        gc.collect()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(shape: Shape, entrants: list[Contender], rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each contender and pass."""
    import torch

    side = 2048 if shape.device == "cpu" else 8192
    square = torch.randn(side, side).to(shape.device, getattr(torch, shape.dtype))
    runs: dict[tuple[int, str], Callable[[], object]] = {(-1, "matmul"): lambda: torch.mm(square, square)}
    for number, contender in enumerate(entrants):
        runs |= {(number, which): partial(contender.once, which) for which in contender.passes}
    seconds, faults = timed(runs, rounds, shape.device)
    if (-1, "matmul") in faults:
        raise UserError(f"a matrix product of {side} fails here: {faults[-1, 'matmul']}")
    peak = 2 * side**3 / median(seconds.pop((-1, "matmul")))
    rows = []
    for (number, which), times in seconds.items():
        fault = faults.get((number, which))
        try:
            rows.append(failed(entrants[number], fault, which) if fault else row(entrants[number], which, times, threads, peak))
        except Exception as error:  # measuring its memory failed
            rows.append(failed(entrants[number], one_line(error), which))
    return rows


def timed(
    runs: dict[tuple[int, str], Callable[[], object]], rounds: int, device: str
) -> tuple[dict[tuple[int, str], list[float]], dict[tuple[int, str], str]]:
    """Seconds of every run in every round after the first, and what went wrong in those that are out from then on."""
    import torch

    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    faults: dict[tuple[int, str], str] = {}
    for turn in range(rounds + 1):
        for key, run in runs.items():
            if key in faults:
                continue
            started = perf_counter()
            try:
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # of any library: the others are still to be timed
                faults[key] = one_line(error)
            if turn:
                seconds[key].append(perf_counter() - started)
    return seconds, faults


def row(contender: Contender, which: str, times: list[float], threads: int, peak: float) -> dict[str, Any]:
    """The figures of one contender and pass; `peak` is the rate of the matrix product in FLOP/s."""
    shape = contender.shape
    pairs = attention_pairs(shape.tokens, shape.causal) * shape.batch
    shared = "shared_scores" in (contender.kernel, contender.chosen)
    flops, exps = attention_cost(contender.config, pairs, which == "fwd_bwd", shared)
    figures: dict[str, Any] = {"variant": contender.variant, "kernel": contender.kernel, "pass": which}
    if contender.kernel == "auto":
        figures["chosen"] = contender.chosen
    figures |= {**vars(shape), "head_dim": shape.head_dim, "threads": threads, "device": machine(shape.device)}
    figures |= {"median_s": median(times), "min_s": min(times), "runs": len(times), "peak_bytes": peak_bytes(contender, which)}
    return figures | {"flops": flops, "exps": exps, "share_of_matmul_peak": flops / median(times) / peak}


def machine(device: str) -> str:
    """The name of the GPU or the processor."""
    import torch

    from pretrain.report.devices import device_name

    return device_name(torch.device(device))


def table(rows: list[dict[str, Any]]) -> str:
    """At most 100 columns wide, but for variants with fields; `speed` is relative to the first row of the same size and pass.

    Failed rows are left out.
    """
    rows = [row for row in rows if "error" not in row]
    wide = max([8, *(len(row["variant"]) for row in rows)])
    header = (
        f"{'variant':<{wide}} {'kernel':<20} {'heads':>5} {'dim':>4} {'tokens':>6} {'pass':<7} {'median ms':>10} {'speed':>7} "
    )
    lines = [header + f"{'peak MiB':>9} {'of matmul':>9}"]
    for row in rows:
        same = ("heads", "width", "tokens", "pass")
        kernel = f"auto ({row['chosen']})" if "chosen" in row else row["kernel"]
        first = next(other for other in rows if all(other[key] == row[key] for key in same))
        lines.append(
            f"{row['variant']:<{wide}} {kernel:<20} {row['heads']:>5} {row['head_dim']:>4} {row['tokens']:>6} "
            f"{row['pass']:<7} {row['median_s'] * 1e3:>10.2f} {first['median_s'] / row['median_s']:>6.2f}x "
            f"{row['peak_bytes'] / 2**20:>9.1f} {row['share_of_matmul_peak']:>9.1%}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """Plot attention_time.png and attention_memory.png against the number of heads, a panel for each width and length."""
    rows = [row for row in rows if "error" not in row]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = sorted({(row["width"], row["tokens"]) for row in rows})
    for name, title, key, unit in (
        ("time", "forward + backward, ms", "median_s", 1e-3),
        ("memory", "peak, MiB", "peak_bytes", 2**20),
    ):
        figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
        for axis, (width, tokens) in zip(axes[0], panels, strict=True):
            here = [row for row in rows if (row["width"], row["tokens"], row["pass"]) == (width, tokens, "fwd_bwd")]
            for variant, kernel in dict.fromkeys((row["variant"], row["kernel"]) for row in here):
                line = sorted((r["heads"], r[key] / unit) for r in here if (r["variant"], r["kernel"]) == (variant, kernel))
                axis.plot(*zip(*line, strict=True), "o-", label=f"{variant}, {kernel}")
            heads = sorted({row["heads"] for row in here})
            axis.set_xscale("log", base=2)
            if name == "time":
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.set_xticks(heads, [str(number) for number in heads])
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.set(title=f"width {width}, {tokens} tokens", xlabel="heads", ylabel=title)
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=7, loc="upper left" if name == "time" else "lower left")
        row = rows[0]
        figure.suptitle(f"{row['device']}, {row['threads']} thread(s), {row['dtype']}, medians of {row['runs']}", fontsize=9)
        figure.savefig(folder / f"attention_{name}.png", dpi=110)


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--variants", default="mha,mhe_add", metavar="A,B", help=f"{VARIANTS_HELP}; default: %(default)s")
    parser.add_argument("--kernels", default="auto,sdpa_expanded", metavar="A,B", help="as above; default: %(default)s")
    parser.add_argument("--heads", default="16,64,128", metavar="N,N", help="default: %(default)s")
    parser.add_argument("--width", default="1024", metavar="N,N", help="heads · head_dim; default: %(default)s")
    parser.add_argument("--tokens", default="1024", metavar="N,N", help="length of a sequence; default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences; default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE), help="default: %(default)s")
    parser.add_argument("--position", default="none", choices=["none", "alibi"], help="default: %(default)s")
    parser.add_argument("--bidirectional", action="store_true", help="no causal mask; default: causal")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="measured runs of each; default: %(default)s")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there")
    pictures = "write attention_time.png and attention_memory.png there"
    parser.add_argument("--plot", type=output_folder, metavar="FOLDER", help=pictures)
    return parser.parse_args()


def sizes_of(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(tokens, width, heads) of every problem; raises UserError."""
    sizes = [
        (tokens, width, heads)
        for tokens in numbers(arguments.tokens, "tokens")
        for width in numbers(arguments.width, "width")
        for heads in numbers(arguments.heads, "heads")
    ]
    for _, width, heads in sizes:
        if width % heads:
            raise UserError(f"--heads {heads}: must divide --width {width}")
    return sizes


def main() -> None:
    arguments = parse()
    variants = variants_of(arguments.variants)
    kernels = names(arguments.kernels, "kernels", KERNELS)
    sizes = sizes_of(arguments)
    if min(arguments.rounds, arguments.batch, arguments.threads or 1) < 1:
        raise UserError("--rounds, --batch and --threads: at least 1")
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences torch's profiler, which measures memory
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device")
    threads = torch.get_num_threads()
    print(
        f"{machine(device)}, {threads} thread(s), torch {torch.__version__}, medians of {arguments.rounds} rounds\n", flush=True
    )
    rows: list[dict[str, Any]] = []
    said: set[str] = set()
    for tokens, width, heads in sizes:
        options = (arguments.batch, arguments.dtype, arguments.position, not arguments.bidirectional, device)
        shape = Shape(heads, width, tokens, *options)
        new: list[dict[str, Any]] = []
        entrants = list(contenders(shape, variants, kernels, said, new))
        if not entrants and not new:
            raise UserError(f"none of {', '.join(variants)} runs by {', '.join(kernels)} here")
        new += measure(shape, entrants, arguments.rounds, threads)
        rows += new
        lines = table(new).splitlines()
        print("\n".join(lines if len(rows) == len(new) else lines[1:]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        upstream.cache_clear()
    if arguments.plot and any("error" not in row for row in rows):
        plot(rows, arguments.plot)


if __name__ == "__main__":
    run_command(main)
