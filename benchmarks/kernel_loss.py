"""Does a kernel train like the formula? `python benchmarks/kernel_loss.py --plot docs/kernel_loss.png --json FILE`.

Trains the configuration with each attention kernel from the same seeds, one run after the other in one process, and compares
training losses: the difference between two kernels with one seed against the difference between two seeds with one kernel.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import itertools
import json
import os
import tempfile
from statistics import mean
from typing import TYPE_CHECKING

from configs.load import load_config
from launch.common import output_file, run_command
from model.faults import model_faults

if TYPE_CHECKING:
    from pretrain.distributed.layout import Layout

Losses = dict[tuple[str, int], list[float]]


def train(config_path: str, kernel: str, seed: int, layout: "Layout", folder: Path, overrides: list[str]) -> list[float]:
    """The training loss of each step."""
    from benchmarks.training import build

    own = [f"--model.attention_kernel={kernel}", f"--run.seed={seed}"]
    config = load_config(config_path, [*overrides, *own], [model_faults], world_size=1)
    trainer = build(config, layout, folder)
    for _ in range(config.training.steps):
        trainer.advance()
    trainer.loader.close()
    trainer.metrics.close()
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def distance(first: list[float], second: list[float]) -> float:
    """Mean absolute difference over the second half, where curves have left their common start."""
    half = len(first) // 2
    return mean(abs(a - b) for a, b in zip(first[half:], second[half:], strict=True))


def spreads(losses: Losses, kernels: list[str], seeds: range) -> dict[str, float]:
    """Mean distances between kernels at the same seed, and between seeds of the same kernel."""
    between_kernels = [distance(losses[a, s], losses[b, s]) for a, b in itertools.combinations(kernels, 2) for s in seeds]
    between_seeds = [distance(losses[k, a], losses[k, b]) for k in kernels for a, b in itertools.combinations(seeds, 2)]
    return {"between_kernels": mean(between_kernels), "between_seeds": mean(between_seeds)}


def plot(losses: Losses, kernels: list[str], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, differences) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for number, kernel in enumerate(kernels):
        for (name, seed), values in losses.items():
            if name == kernel:
                style = {"color": f"C{number}", "linewidth": 1, "linestyle": "-" if number == 0 else "--"}
                curves.plot(values, label=kernel if seed == 0 else None, **style)
    first, *others = kernels
    for (name, seed), values in losses.items():
        if name in others:
            gap = [b - a for a, b in zip(losses[first, seed], values, strict=True)]
            differences.plot(gap, color="C1", linewidth=1, label=f"{name} − {first}, same seed" if seed == 0 else None)
        elif seed > 0:
            gap = [b - a for a, b in zip(losses[first, 0], values, strict=True)]
            differences.plot(gap, color="gray", linewidth=0.6, label=f"two seeds of {first}" if seed == 1 else None)
    curves.set(xlabel="step", ylabel="training loss (nats per token)")
    differences.set(xlabel="step", ylabel="difference of losses")
    for axis in (curves, differences):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default="math,shared_scores", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each kernel; default: %(default)s")
    parser.add_argument("--config", default="configs/quickstart_cpu.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--plot", type=output_file(".png", ".svg"), metavar="FILE", help="picture to write, .png or .svg")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the losses there")
    arguments, overrides = parser.parse_known_args()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    from pretrain.distributed.layout import Layout
    from pretrain.distributed.process import prepare_process
    from pretrain.distributed.rendezvous import open_layout

    kernels, seeds = arguments.kernels.split(","), range(arguments.seeds)
    overrides.append(f"--training.precision={arguments.precision}")
    layout = Layout.from_environment()
    prepare_process(layout, deterministic=True)
    losses: Losses = {}
    with tempfile.TemporaryDirectory() as scratch, open_layout(layout):
        for seed, kernel in itertools.product(seeds, kernels):
            losses[kernel, seed] = train(arguments.config, kernel, seed, layout, Path(scratch, f"{kernel}-{seed}"), overrides)
            print(f"{kernel:<14} seed {seed}  last loss {losses[kernel, seed][-1]:.4f}", flush=True)
    found = spreads(losses, kernels, seeds)
    print(f"mean difference: {found['between_kernels']:.4f} between kernels, {found['between_seeds']:.4f} between seeds")
    if arguments.plot:
        plot(losses, kernels, f"{Path(arguments.config).stem}, {arguments.precision}", arguments.plot)
    if arguments.json:
        rows = [{"kernel": kernel, "seed": seed, "losses": values} for (kernel, seed), values in losses.items()]
        arguments.json.write_text(json.dumps({"spreads": found, "runs": rows}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
