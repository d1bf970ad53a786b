"""Plot a run's metrics.jsonl: `python benchmarks/plot_run.py runs/quickstart_cpu --output docs/quickstart.png`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse

from configs.errors import UserError
from launch.common import number, output_file, run_command
from pretrain.report.records import METRICS, read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", required=True, type=output_file(".png", ".svg"), metavar="FILE", help="picture to write, .png or .svg"
    )
    parser.add_argument(
        "--unigram", type=number(0, 100), metavar="NATS", help="draw a unigram model's loss, as launch/evaluate.py prints it"
    )
    arguments = parser.parse_args()
    lines = read_metrics(arguments.run)
    if not any("loss" in line for line in lines):
        raise UserError(f"{arguments.run / METRICS}: has no training steps; name the folder of a run that has trained")
    plot(lines, arguments.unigram, arguments.output)


def plot(lines: list[dict[str, float]], unigram: float | None, output: Path) -> None:
    """Loss, gradient norm and speed by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels = (("loss", "loss (nats per token)"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens per second"))
    for axis, (name, title) in zip(axes, panels, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1, label="training")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    held_out = [(line["step"], line["validation/loss"]) for line in lines if "validation/loss" in line]
    if held_out:
        axes[0].plot(*zip(*held_out, strict=True), "o-", label="validation")
    if unigram:
        axes[0].axhline(unigram, color="gray", linestyle="--", label="unigram model")
    axes[0].legend()
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    run_command(main)
