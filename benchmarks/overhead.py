"""The overhead of our loop over the bare engine: `python benchmarks/overhead.py --json overhead.json`.

Ours is a step of the Trainer that launch/pretrain.py runs: loader, backend, metrics, TensorBoard, the agreement to stop. Bare
is benchmarks/bare_deepspeed.py or bare_fsdp.py: the same model, initial weights, optimizer and engine settings in a few lines,
with batches preloaded in memory and no log. Both run in the same processes and alternate step by step, with ours first, then
bare first; a step is measured between two barriers. `ratio` is 1 + median of the paired differences / median of the bare
steps, `low` and `high` the same with the quartiles of the differences; a ratio above 1.03 is exit status 1. `cpu_ratio` is the
same for the first rank's CPU time, all threads, which depends less on other load. Losses must be equal, since both do the same
work.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from benchmarks import bare_deepspeed, bare_fsdp
from benchmarks.ranks import one_of, run_ranks
from benchmarks.training import build
from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from data_pipeline.read.loader import Batch
from launch.common import ConfigArguments, output_file, run_command, whole_number

if TYPE_CHECKING:
    from pretrain.distributed.layout import Layout

GOAL = 1.03
WARMUP = 4  # pairs of steps
ENGINES = {
    "ZeRO 1": ("--backend=deepspeed", "--parallel.zero_stage=1"),
    "ZeRO 2": ("--backend=deepspeed", "--parallel.zero_stage=2"),
    "FSDP": ("--backend=fsdp",),
}
SAME_WORK = (  # a constant learning rate, so low that rounding does not grow; one kind of parameters
    "--optimizer.lr=1e-5",
    "--schedule.warmup_steps=0",
    "--schedule.min_lr_ratio=1",
    "--optimizer.weight_decay=0",
    "--logging.tensorboard=true",
)
LOSSES = 1e-5  # relative difference
Step = Callable[[Sequence[Batch]], Tensor]


@dataclass(frozen=True)
class Row:
    """Medians over paired steps, in seconds, the overhead of ours, and the largest relative difference of losses."""

    engine: str
    ranks: int
    pairs: int
    ours: float
    bare: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float
    losses_apart: float


def batches(config: Config, steps: int) -> list[list[Batch]]:
    """What this rank trains on in each step, in memory."""
    from data_pipeline.mix.mixture import training_samples
    from data_pipeline.read.loader import TrainLoader

    training, rank, ranks = config.training, dist.get_rank(), dist.get_world_size()
    data = training_samples(config)
    with TrainLoader(data, training.global_batch_size, training.micro_batch_size, rank, ranks, steps) as loader:
        return [loader.step(step) for step in range(steps)]


BARE = {"deepspeed": bare_deepspeed.build, "fsdp": bare_fsdp.build}


def bare_step(config: Config) -> Step:
    with contextlib.redirect_stdout(io.StringIO()):
        return BARE[config.backend](config)


def seconds(step: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock time, and CPU time of this process over all threads."""
    dist.barrier()
    started, started_cpu = perf_counter(), process_time()
    step()
    dist.barrier()
    return perf_counter() - started, process_time() - started_cpu


def paired_ratios(ours: Sequence[float], bare: Sequence[float]) -> list[float]:
    """1 + the quartiles of the differences / the median of bare."""
    quartiles = quantiles([mine - theirs for mine, theirs in zip(ours, bare, strict=True)], n=4)
    return [1 + quartile / median(bare) for quartile in quartiles]


def take_turns(name: str, config: Config, layout: "Layout", folder: Path, pairs: int) -> Row:
    """Alternate steps of ours and of the bare engine. Every rank must call this."""
    trainer = build(config, layout, folder)
    given = batches(trainer.config, WARMUP + pairs)
    bare = bare_step(trainer.config)
    losses: list[Tensor] = []
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    for number, micro_batches in enumerate(given):
        turns: dict[str, Callable[[], Any]] = {
            "ours": trainer.advance,
            "bare": lambda own=micro_batches: losses.append(bare(own)),  # type: ignore[misc]
        }
        for who in ("ours", "bare") if number % 2 == 0 else ("bare", "ours"):
            times[who].append(seconds(turns[who]))
    trainer.loader.close()
    trainer.metrics.close()
    apart = _losses_apart(folder, losses, layout)
    (ours, ours_cpu), (others, others_cpu) = (zip(*times[who][WARMUP:], strict=True) for who in ("ours", "bare"))
    low, ratio, high = paired_ratios(ours, others)
    cpu_ratio = paired_ratios(ours_cpu, others_cpu)[1]
    return Row(name, layout.world_size, pairs, median(ours), median(others), ratio, low, high, cpu_ratio, apart)


def _losses_apart(folder: Path, losses: Sequence[Tensor], layout: "Layout") -> float:
    """The largest relative difference from the losses in metrics.jsonl, which the first rank has."""
    from pretrain.distributed.collectives import mean_over_ranks

    bare = mean_over_ranks([float(loss.double().mean()) for loss in losses], layout.device)
    if not layout.is_main:
        return 0.0
    ours = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return max(abs(a - b) / b for a, b in zip(ours, bare, strict=True))


def overhead_rank(rank: int, port: int, ranks: int, configs: dict[str, Config], folder: Path, pairs: int) -> None:
    """One process; the first writes the rows."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    with one_of(ranks, rank, port) as layout:
        rows = [take_turns(name, config, layout, folder / f"{name}_{rank}", pairs) for name, config in configs.items()]
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def measure(configs: dict[str, Config], ranks: int, pairs: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(overhead_rank, ranks, ranks, configs, Path(folder), pairs)
        return [Row(**row) for row in json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))]


def run_alone(build_step: Callable[[Config], Step], backend: str) -> None:
    """The bare scripts' own entry, under a launcher: train; the first rank prints the last loss and the time."""
    from data_pipeline.read.manifest import read_manifest
    from pretrain.distributed.layout import Layout
    from pretrain.distributed.rendezvous import open_layout

    parser = ConfigArguments("Train with the bare engine, under `deepspeed` or `torchrun`.")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    _, config = parser.parse()
    if config.backend != backend:
        raise UserError(f"backend = {config.backend!r}: this script is {backend}; pass --backend={backend}")
    config = config.resolved(read_manifest(Path(config.data.parts[0].path)).vocab_size)
    with open_layout(Layout.from_environment()):
        given = batches(config, config.training.steps)
        step, started = build_step(config), perf_counter()
        for micro_batches in given:
            losses = step(micro_batches)
        if dist.get_rank() == 0:
            print(f"loss {losses.mean():.4f}, {(perf_counter() - started) / len(given) * 1e3:.1f} ms a step")


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':<8} {'ours ms':>9} {'bare ms':>9} {'ratio':>7} {'quartiles':>15} {'cpu':>7}"]
    for row in rows:
        ms = f"{row.ours * 1e3:>9.1f} {row.bare * 1e3:>9.1f}"
        quartiles = f"{row.low:.3f} to {row.high:.3f}"
        lines.append(f"{row.engine:<8} {ms} {row.ratio:>7.3f} {quartiles:>15} {row.cpu_ratio:>7.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart_cpu.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--ranks", type=whole_number(1), default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--pairs", type=whole_number(4), default=40, metavar="N", help="measured steps of each; default: %(default)s"
    )
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
    arguments, overrides = parser.parse_known_args()
    from data_pipeline.prepare.prepare import PrepareOptions, prepare

    with tempfile.TemporaryDirectory() as scratch:
        steps = f"--training.steps={WARMUP + arguments.pairs}"
        configs = {
            name: load_config(arguments.config, [*SAME_WORK, *overrides, *settings, steps], world_size=arguments.ranks)
            for name, settings in ENGINES.items()
        }
        data = next(iter(configs.values())).data
        if not Path(data.parts[0].path, "manifest.json").exists():
            print(f"{data.parts[0].path} is not prepared: measuring on the standard library instead", file=sys.stderr)
            prepare(PrepareOptions(inputs=("stdlib",), output=Path(scratch, "data"), vocab_size=4096))
            prepared = data.model_copy(update={"path": f"{scratch}/data"})
            configs = {name: config.model_copy(update={"data": prepared}) for name, config in configs.items()}
        rows = measure(configs, arguments.ranks, arguments.pairs)
    print(table(rows))
    if arguments.json:
        text = ",\n".join(json.dumps(asdict(row)) for row in rows)
        arguments.json.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    apart = [f"{row.engine} ({row.losses_apart:.1e})" for row in rows if row.losses_apart > LOSSES]
    if apart:
        raise UserError(f"losses of ours and bare differ: {', '.join(apart)}: they do not do the same work")
    slow = [row.engine for row in rows if row.ratio > GOAL]
    if slow:
        raise UserError(f"{', '.join(slow)}: more than {GOAL} times a bare step")


if __name__ == "__main__":
    run_command(main)
