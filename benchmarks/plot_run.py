"""Plot a run's metrics.jsonl: `python benchmarks/plot_run.py runs/quickstart_cpu --output docs/quickstart.png`."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", required=True, metavar="FILE", help="picture to write, .png or .svg")
    parser.add_argument(
        "--unigram", type=float, metavar="NATS", help="draw a unigram model's loss, as launch/evaluate.py prints it"
    )
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in Path(arguments.run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels = (("loss", "loss (nats per token)"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens per second"))
    for axis, (name, title) in zip(axes, panels, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1, label="training")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    held_out = [(line["step"], line["validation/loss"]) for line in lines if "validation/loss" in line]
    axes[0].plot(*zip(*held_out, strict=True), "o-", label="validation")
    if arguments.unigram:
        axes[0].axhline(arguments.unigram, color="gray", linestyle="--", label="unigram model")
    axes[0].legend()
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
