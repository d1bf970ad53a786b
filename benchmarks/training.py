"""A training step of several attention variants, side by side: `python benchmarks/training.py --json training.json`.

All variants have the width, depth, heads and head_dim of the configuration; with --match parameters the MLP of each is as wide
as it takes to have the parameters of the first. One process trains them alternately with the
Trainer that launch/pretrain.py uses, with metrics and TensorBoard; figures are medians over steps. `ours` is the share of a
step outside DeepSpeed's forward, backward and optimizer: loader, metrics, logging, Python. Peak memory comes from a separate
process for each variant: allocated on a GPU, or resident on a CPU minus what was resident before the model was built.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.arguments import VARIANTS_HELP, variants_of
from benchmarks.contenders import equal, load_contender
from configs.schema import Config
from launch.common import output_file, run_command, whole_number
from model.costs.solve import COSTS

if TYPE_CHECKING:
    from pretrain.distributed.layout import Layout

PEAK_STEPS = 3


def build(config: Config, layout: "Layout", folder: Path) -> Any:
    """A Trainer of this configuration without validation and checkpoints."""
    from data_pipeline.read.manifest import read_manifest
    from pretrain.build import build_trainer

    run = config.run.model_copy(update={"folder": str(folder)})
    folder.mkdir(parents=True)
    manifest = read_manifest(config.data.parts[0].path)
    config = config.model_copy(update={"run": run}).resolved(manifest.vocab_size, manifest.end_of_document)
    trainer = build_trainer(config, layout)
    trainer.hooks = []
    trainer.progress.speaks = False
    return trainer


class EngineClock:
    """Adds up the time inside the engine's forward, backward and step, and of the loss from logits."""

    def __init__(self, backend: Any) -> None:
        self.seconds = 0.0
        calls = [(backend.engine, name) for name in ("forward", "backward", "step")] + [(backend.objective, "loss")]
        for owner, name in calls:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = perf_counter()
            result = function(*arguments, **options)
            self.seconds += perf_counter() - started
            return result

        return call


def speed(configs: dict[str, Config], layout: "Layout", folder: Path, steps: int) -> list[dict[str, Any]]:
    """One row for each variant; the variants alternate step by step, and the first step of each is not counted."""
    import torch

    trainers = {name: build(config, layout, folder / name) for name, config in configs.items()}
    clocks = {name: EngineClock(trainer.backend) for name, trainer in trainers.items()}
    totals: dict[str, list[float]] = {name: [] for name in trainers}
    shares: dict[str, list[float]] = {name: [] for name in trainers}
    for step in range(steps + 1):
        for name, trainer in trainers.items():
            clocks[name].seconds = 0.0
            started = perf_counter()
            trainer.advance()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            total = perf_counter() - started
            if step:
                totals[name].append(total)
                shares[name].append(1 - clocks[name].seconds / total)
    rows = []
    for name, trainer in trainers.items():
        trainer.loader.close()
        rows.append(
            {
                "variant": name,
                "model": configs[name].model.model_dump(exclude_defaults=True),
                "ffn_hidden_size": configs[name].model.ffn_width,
                "parameters": sum(p.numel() for p in trainer.backend.module.parameters()),
                "median_s": median(totals[name]),
                "min_s": min(totals[name]),
                "runs": steps,
                "tokens_per_second": trainer.throughput.tokens_per_step / median(totals[name]),
                "ours": median(shares[name]),
            }
        )
    return rows


def peak_bytes(config: Config, folder: str, answer: Any) -> None:
    """Send the peak memory of a few steps; runs in its own process."""
    import torch

    from pretrain.build import backend_class
    from pretrain.distributed.layout import Layout
    from pretrain.distributed.rendezvous import open_layout

    backend_class(config)  # imports the engine: libraries are no memory of the model
    with open_layout(Layout.from_environment()) as layout:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trainer = build(config, layout, Path(folder))
        for _ in range(PEAK_STEPS):
            trainer.advance()
        trainer.loader.close()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    answer.send(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident)


def measure_peak(config: Config, folder: Path) -> int:
    context = multiprocessing.get_context("spawn")
    receive, answer = context.Pipe(duplex=False)
    process = context.Process(target=peak_bytes, args=(config, str(folder), answer))
    process.start()
    answer.close()
    value: int = receive.recv()
    process.join()
    return value


def load(arguments: argparse.Namespace, overrides: list[str], scratch: Path) -> dict[str, Config]:
    """The configurations of all contenders, on prepared data."""
    configs = {name: load_contender(arguments.config, overrides, name) for name in variants_of(arguments.variants)}
    configs = on_prepared(configs, scratch)
    return equal(configs, arguments.match) if arguments.match else configs


def on_prepared(configs: dict[str, Config], scratch: Path) -> dict[str, Config]:
    """With data that is there: the configuration's, or else the standard library."""
    from data_pipeline.prepare.prepare import PrepareOptions, prepare

    data = next(iter(configs.values())).data
    if Path(data.parts[0].path, "manifest.json").exists():
        return configs
    print(f"{data.parts[0].path} is not prepared: measuring on the standard library instead", file=sys.stderr)
    prepare(PrepareOptions(inputs=("stdlib",), output=scratch / "data", vocab_size=4096))
    data = data.model_copy(update={"path": str(scratch / "data")})
    return {name: one.model_copy(update={"data": data}) for name, one in configs.items()}


def in_turns(configs: dict[str, Config], scratch: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of `speed`, from a process group of this process alone."""
    from pretrain.distributed.layout import Layout
    from pretrain.distributed.process import prepare_process
    from pretrain.distributed.rendezvous import open_layout

    layout = Layout.from_environment()
    prepare_process(layout, next(iter(configs.values())).training.deterministic)
    with open_layout(layout):
        return speed(configs, layout, scratch, steps)


def table(rows: list[dict[str, Any]]) -> str:
    slowest, width = rows[0]["median_s"], max(10, *(len(row["variant"]) for row in rows))
    header = f"{'variant':<{width}} {'parameters':>12} {'MLP':>6} {'step ms':>9} {'tokens/s':>10} {'speed':>7} "
    lines = [header + f"{'peak MiB':>9} {'ours':>6}"]
    for row in rows:
        lines.append(
            f"{row['variant']:<{width}} {row['parameters']:>12,} {row['ffn_hidden_size']:>6} {row['median_s'] * 1e3:>9.1f} "
            f"{row['tokens_per_second']:>10,.0f} {slowest / row['median_s']:>6.2f}x {row['peak_bytes'] / 2**20:>9,.0f} "
            f"{row['ours']:>6.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", default="mha,mhe_add,mhe_mul", metavar="A,B", help=f"{VARIANTS_HELP}; default: %(default)s"
    )
    parser.add_argument("--config", default="configs/quickstart_cpu.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--match", choices=COSTS, help="models that cost what the first one does (docs/fair_comparisons.md)")
    parser.add_argument(
        "--steps", type=whole_number(1), default=20, metavar="N", help="measured steps of each variant; default: %(default)s"
    )
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="default: all cores")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
    arguments, overrides = parser.parse_known_args()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for this process, before torch is imported, and the others
    with tempfile.TemporaryDirectory() as scratch:
        configs = load(arguments, overrides, Path(scratch))
        peaks = {name: measure_peak(one, Path(scratch, "peak", name)) for name, one in configs.items()}
        rows = in_turns(configs, Path(scratch, "speed"), arguments.steps)
    for row in rows:
        row["peak_bytes"] = peaks[row["variant"]]
    config = next(iter(configs.values()))
    model = config.model
    print(
        f"{model.num_layers} layers × {model.hidden_size}, {model.num_heads} heads × {model.head_width}, "
        f"{config.training.global_batch_size} × {config.data.sequence_length} tokens, {config.training.precision}, "
        f"{arguments.threads or os.cpu_count()} threads, {platform.machine()}, medians of {arguments.steps} steps"
    )
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
