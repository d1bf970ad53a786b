"""Attention of one layer, without projections: `python benchmarks/attention.py --json attention.json --plot docs`.

Variants × kernels × heads × lengths, side by side in one process in turns: every round runs each contender once, and one square
matrix product whose rate is the machine's peak. Figures are medians over the rounds after the first. Each contender starts
from q, k, v (and head embeddings) and ends with its heads side by side, as the output projection reads them; before anything
is timed, its results and gradients (at no more than 640 tokens) must equal those of the formula.

JSON: a list of rows with variant, kernel (and what auto has `chosen`), pass = fwd | fwd_bwd, heads, head_dim, width, tokens,
batch, dtype, position, causal, device, threads, median_s, min_s, runs; peak_bytes, the most memory held beyond the inputs;
flops and exps, the useful ones by model/costs/flops.py, causal half; share_of_matmul_peak = flops / median_s
over the peak.

Kernels: auto, math, sdpa, shared_scores as in model.attention_kernel; sdpa_expanded writes out K and V of all heads (naive
MHE); flex is torch's FlexAttention, compiled; on CUDA sdpa_flash, sdpa_cudnn and sdpa_efficient force a backend. `all`:
whatever runs here. `speed` in the table is against the first row of the same size and pass: `mha` by auto or sdpa is what a
user would take instead.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from launch.common import run_command
from model.costs.flops import attention_pairs, head_by_head_cost, shared_scores_cost

if TYPE_CHECKING:
    import torch

VARIANTS = ("mha", "mqa", "mhe_add", "mhe_mul")
BACKENDS = {"sdpa_flash": "FLASH_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION", "sdpa_efficient": "EFFICIENT_ATTENTION"}
KERNELS = ("auto", "math", "sdpa", "shared_scores", "sdpa_expanded", "flex", *BACKENDS)
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


class NotHereError(Exception):
    """Why a contender does not exist or does not run here."""


@dataclass(frozen=True)
class Shape:
    """One size of problem."""

    heads: int
    width: int
    tokens: int
    batch: int
    dtype: str
    position: str
    causal: bool
    device: str

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass
class Contender:
    """A variant computed by a kernel: `run()` gives (S, B, N·D) from `leaves`."""

    variant: str
    kernel: str
    shape: Shape
    run: "Callable[[], torch.Tensor]"
    leaves: "list[torch.Tensor]"
    chosen: str
    passes: tuple[str, ...] = ("fwd", "fwd_bwd")

    def once(self, which: str) -> None:
        """One timed run."""
        import torch

        if which == "fwd":
            with torch.no_grad():
                self.run()
        else:
            out = self.run()
            torch.autograd.grad(out, self.leaves, upstream(out), allow_unused=True)


def upstream(out: "torch.Tensor") -> "torch.Tensor":
    """A gradient to start from, made once for each shape."""
    import torch

    key = (out.shape, out.dtype, out.device)
    if key not in _UPSTREAM:
        _UPSTREAM[key] = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return _UPSTREAM[key]


_UPSTREAM: dict[Any, "torch.Tensor"] = {}


def build(variant: str, kernel: str, shape: Shape) -> Contender:
    """Tensors of unit size, embeddings of the usual 0.02. Raises NotHereError."""
    import torch
    from torch import nn

    from configs.schema import ModelConfig
    from model.attention.kernels import choose
    from model.attention.registry import attention_class
    from model.layers import Layers
    from model.positions.positions import AttentionMask, make_positions

    if kernel == "shared_scores" and variant != "mhe_add":
        raise NotHereError("only the heads of mhe_add share their scores")
    if kernel == "sdpa_expanded" and variant == "mha":
        raise NotHereError("its heads have keys and values of their own")
    if kernel in BACKENDS and shape.device == "cpu":
        raise NotHereError("a CUDA backend")
    draw, device, dtype = torch.Generator().manual_seed(0), torch.device(shape.device), getattr(torch, shape.dtype)

    def leaf(*size: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=draw) * std).to(device, dtype).requires_grad_()

    mhe = variant.startswith("mhe_")
    size = (shape.batch, shape.tokens, shape.head_dim)
    q, k, v = (leaf(size[0], n, *size[1:]) for n in (1 if mhe else shape.heads, *[shape.heads if variant == "mha" else 1] * 2))
    own_kernel = kernel if kernel in ("auto", "math", "shared_scores") else "sdpa"
    config = ModelConfig(
        attention=variant,
        hidden_size=shape.width,
        num_layers=1,
        num_heads=shape.heads,
        position=shape.position,  # type: ignore[arg-type]
        attention_kernel=own_kernel,  # type: ignore[arg-type]
    )
    positions = make_positions(config, shape.tokens, 0, dtype, device, AttentionMask(shape.causal))
    leaves, chosen = [q, k, v], "sdpa" if own_kernel == "auto" else kernel
    module = None
    if mhe:

        class NoLinears(Layers):
            def shared(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
                return nn.Identity()

            row = shared

        module = attention_class(variant)(config, NoLinears()).to(device, dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(leaf(*parameter.shape, std=0.02))
        leaves += list(module.parameters())
        if variant == "mhe_add":
            sizes = {"heads": shape.heads, "head_dim": shape.head_dim, "queries": shape.tokens, "keys": shape.tokens}
            chosen = choose(own_kernel, shares_scores=True, device=device, dtype=dtype, **sizes).kernel
    run = _way(kernel, (q, k, v), module, positions, shape, own_kernel)
    return Contender(variant, kernel, shape, run, leaves, chosen if kernel == "auto" else kernel)


def _way(kernel: str, qkv: Any, module: Any, positions: Any, shape: Shape, own_kernel: str) -> Callable[[], Any]:
    """The function that computes the heads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from model.attention.kernels import attend, merge_heads, repeat_heads

    q, k, v = qkv
    scale = shape.head_dim**-0.5
    if kernel == "flex":
        return _flex(q, k, v, module, positions, shape)
    if kernel == "sdpa_expanded":

        def expanded() -> Any:
            q_BNSD, k_BNSD, v_BNSD = written_out(q, k, v, module, shape.heads)
            return merge_heads(attend(q_BNSD, k_BNSD, v_BNSD, positions, scale=scale, kernel="sdpa"))

        return expanded
    forced = partial(sdpa_kernel, getattr(SDPBackend, BACKENDS[kernel])) if kernel in BACKENDS else nullcontext

    def run() -> Any:
        with forced():
            if module is not None:
                return module.heads(q, module.key_features(k, positions), v, module.own_rows(), positions, own_kernel)
            # A forced backend gets as many heads of K and V as of q, which all of them take.
            keys, values = (repeat_heads(x, shape.heads) if kernel in BACKENDS else x for x in (k, v))
            return merge_heads(attend(q, keys, values, positions, scale=scale, kernel=own_kernel))

    return run


def written_out(q: Any, k: Any, v: Any, module: Any, heads: int) -> list[Any]:
    """Q, K and V of all heads in memory, by the formulas of the papers."""
    if module is None:
        return [x.expand(-1, heads, -1, -1).contiguous() for x in (q, k, v)]
    e_query, e_key, e_value = (e_ND[:, None] for e_ND in module.own_rows().values())
    pairs = ((q, e_query), (k, e_key), (v, e_value))
    return [x + e for x, e in pairs] if type(module).__name__ == "MHEAdd" else [x * (1 + e) for x, e in pairs]


def _flex(q: Any, k: Any, v: Any, module: Any, positions: Any, shape: Shape) -> Callable[[], Any]:
    """FlexAttention, compiled; MHE-ADD with its key bias as a score modification, all else with all heads written out."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from model.attention.kernels import merge_heads

    # Code of its own for each contender and size; past torch's limit of 8 an error (fullgraph) instead of uncompiled runs.
    # torch's type hints do not know isolate_recompiles.
    compiled = torch.compile(  # type: ignore[call-overload]
        flex_attention, fullgraph=True, dynamic=False, isolate_recompiles=True
    )
    mask, slopes = None, positions.slopes_N
    if shape.causal:
        mask = create_block_mask(lambda b, h, t, j: t >= j, None, None, shape.tokens, shape.tokens, shape.device)
    shares = type(module).__name__ == "MHEAdd"

    def run() -> Any:
        if shape.device == "cpu" and torch.is_grad_enabled():
            # Raised here and not by the compiler, which after an error of its own runs the function uncompiled from then on.
            raise NotImplementedError("FlexAttention has no backward pass on CPUs")
        bias = None
        if shares:
            bias = torch.einsum("nd,btd->bnt", module.query_embedding, k[:, 0]) * shape.head_dim**-0.5
            tensors = [x.expand(-1, shape.heads, -1, -1) for x in (q, k, v)]
        else:
            tensors = written_out(q, k, v, module, shape.heads)
        if not torch.is_grad_enabled():
            tensors = [x.detach() for x in tensors]  # on CPUs it refuses what could get a gradient

        def modify(score: Any, b: Any, h: Any, t: Any, j: Any) -> Any:
            score = score if bias is None else score + bias[b, h, j]
            return score if slopes is None else score - slopes[h] * (t - j)

        score_mod = modify if bias is not None or slopes is not None else None
        out = compiled(tensors[0], tensors[1], tensors[2], block_mask=mask, score_mod=score_mod)
        return merge_heads(module.head_outputs(out, module.own_rows()) if shares else out)

    return run


def check(contender: Contender) -> None:
    """Compare with the formula at a small size. NotHereError where the contender cannot run, UserError where it is wrong."""
    import torch

    small = Shape(**{**vars(contender.shape), "tokens": min(contender.shape.tokens, 640)})
    # `chosen`, not `auto`, which may take another kernel at the small size than at the one that is timed.
    found, wanted = (build(contender.variant, kernel, small) for kernel in (contender.chosen, "math"))
    results = []
    for one in (found, wanted):
        try:
            with torch.no_grad():
                values = [one.run()]
        except (RuntimeError, NotImplementedError, ImportError) as error:
            raise NotHereError(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}") from error
        try:
            out = one.run()
            values += torch.autograd.grad(out, one.leaves, upstream(out), allow_unused=True)
        except (RuntimeError, NotImplementedError):
            contender.passes = ("fwd",)
        results.append(values)
    nothing = torch.zeros((), device=small.device)
    for a, b in zip(*results, strict=len(contender.passes) == 2):
        exact = nothing if b is None else b
        off, size = float(((nothing if a is None else a) - exact).norm()), float(exact.norm())
        if not off <= TOLERANCE[small.dtype] * max(size, 1e-2 * float(results[1][0].norm())):
            raise UserError(f"{contender.variant} by {contender.kernel} is wrong: off by {off:.2e} of {size:.2e}")


def contenders(shape: Shape, variants: list[str], kernels: list[str], said: set[str]) -> Iterator[Contender]:
    """Those that exist and are right; each of the others is explained once."""
    for variant in variants:
        for kernel in kernels:
            try:
                contender = build(variant, kernel, shape)
                check(contender)
            except NotHereError as error:
                text = f"left out: {variant} by {kernel}: {error}"
                if text not in said:
                    print(text, file=sys.stderr)
                said.add(text)
                continue
            if len(contender.passes) == 1:
                print(f"{variant} by {kernel}: forward only, its backward pass does not run here", file=sys.stderr)
            yield contender


def peak_bytes(contender: Contender, which: str) -> int:
    """The most memory that one run holds beyond its inputs, scratch memory of the kernel included."""
    import torch

    from model.attention.shared_scores.blocks import SPACE

    contender.once(which)
    SPACE.buffers.clear()
    if contender.shape.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.once(which)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
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
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    for turn in range(rounds + 1):
        for key, run in runs.items():
            started = perf_counter()
            run()
            if shape.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[key].append(perf_counter() - started)
    peak = 2 * side**3 / median(seconds[-1, "matmul"])
    rows = []
    for (number, which), times in seconds.items():
        if number < 0:
            continue
        contender = entrants[number]
        shared = contender.variant == "mhe_add" and "shared_scores" in (contender.kernel, contender.chosen)
        pairs = attention_pairs(shape.tokens, shape.causal) * shape.batch
        cost = shared_scores_cost if shared else head_by_head_cost
        flops, exps = cost(shape.heads, shape.head_dim, pairs, which == "fwd_bwd")
        row: dict[str, Any] = {"variant": contender.variant, "kernel": contender.kernel, "pass": which}
        if contender.kernel == "auto":
            row["chosen"] = contender.chosen
        row |= {**vars(shape), "head_dim": shape.head_dim, "threads": threads, "device": machine(shape.device)}
        row |= {"median_s": median(times), "min_s": min(times), "runs": len(times), "peak_bytes": peak_bytes(contender, which)}
        row |= {"flops": flops, "exps": exps, "share_of_matmul_peak": flops / median(times) / peak}
        rows.append(row)
    return rows


def machine(device: str) -> str:
    """The name of the processor."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def table(rows: list[dict[str, Any]]) -> str:
    """At most 100 columns; `speed` is against the first row of the same size and pass."""
    header = f"{'variant':<8} {'kernel':<20} {'heads':>5} {'dim':>4} {'tokens':>6} {'pass':<7} {'median ms':>10} {'speed':>7} "
    lines = [header + f"{'peak MiB':>9} {'of matmul':>9}"]
    for row in rows:
        same = ("heads", "width", "tokens", "pass")
        kernel = f"auto ({row['chosen']})" if "chosen" in row else row["kernel"]
        first = next(other for other in rows if all(other[key] == row[key] for key in same))
        lines.append(
            f"{row['variant']:<8} {kernel:<20} {row['heads']:>5} {row['head_dim']:>4} {row['tokens']:>6} "
            f"{row['pass']:<7} {row['median_s'] * 1e3:>10.2f} {first['median_s'] / row['median_s']:>6.2f}x "
            f"{row['peak_bytes'] / 2**20:>9.1f} {row['share_of_matmul_peak']:>9.1%}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """attention_time.png and attention_memory.png: against the number of heads, a panel for each width and length."""
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


def numbers(text: str, name: str) -> list[int]:
    """A comma list of positive whole numbers."""
    values = text.split(",")
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise UserError(f"--{name} {text}: positive whole numbers, separated by commas")
    return [int(value) for value in values]


def names(text: str, name: str, known: tuple[str, ...]) -> list[str]:
    values = list(known) if text == "all" else text.split(",")
    unknown = [value for value in values if value not in known]
    if unknown:
        raise UserError(f"--{name} {','.join(unknown)}: known: {', '.join(known)}, all")
    return values


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--variants", default="mha,mhe_add", metavar="A,B", help=f"{', '.join(VARIANTS)}, all; default: %(default)s"
    )
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
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="counted runs of each; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write attention_time.png and attention_memory.png there")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    variants = names(arguments.variants, "variants", VARIANTS)
    kernels = names(arguments.kernels, "kernels", KERNELS)
    sizes = [
        (tokens, width, heads)
        for tokens in numbers(arguments.tokens, "tokens")
        for width in numbers(arguments.width, "width")
        for heads in numbers(arguments.heads, "heads")
    ]
    for _, width, heads in sizes:
        if width % heads:
            raise UserError(f"--heads {heads}: must divide --width {width}")
    if min(arguments.rounds, arguments.batch, arguments.threads or 1) < 1:
        raise UserError("--rounds, --batch and --threads: at least 1")
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler counts memory; it need not say so
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
        entrants = list(contenders(shape, variants, kernels, said))
        if not entrants:
            raise UserError(f"none of {', '.join(variants)} runs by {', '.join(kernels)} here")
        new = measure(shape, entrants, arguments.rounds, threads)
        rows += new
        lines = table(new).splitlines()
        print("\n".join(lines if len(rows) == len(new) else lines[1:]), flush=True)
        _UPSTREAM.clear()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        arguments.plot.mkdir(parents=True, exist_ok=True)
        plot(rows, arguments.plot)


if __name__ == "__main__":
    run_command(main)
