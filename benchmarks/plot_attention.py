"""The map of attention variants in docs/attention.md: `python benchmarks/plot_attention.py --output docs/attention_map.png`.

Across: values that the cache keeps of a token in one layer, by formula. Upwards: how many independent linear functions of a
hidden state the queries of all heads are made of, measured as the rank of their derivative in a real layer in float64.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
from typing import Any

from launch.common import output_file, run_command

HIDDEN, HEADS = 768, 12  # as in the papers' tables: 12 heads of 64
# label → fields of the model; those of one line are joined
LINES: dict[str, dict[str, dict[str, Any]]] = {
    "one head of keys: queries grow freer": {
        "sha": {"attention": "sha"},
        "mhe_add, mhe_mul": {"attention": "mhe_add"},
        "mhe_low_rank, rank 64": {"attention": "mhe_low_rank", "query_rank": 64},
        "mfa, rank 384": {"attention": "mfa", "query_rank": 384},
        "mqa": {"attention": "mqa"},
    },
    "MHE with more seeds": {
        **{f"{seeds} seeds": {"attention": "mhe_add", "num_seeds": seeds} for seeds in (2, 4, 6)},
        "mha = 12 seeds without embeddings": {"attention": "mha"},
    },
    "": {
        "gqa, 4 groups": {"attention": "gqa", "num_kv_heads": 4},
        "skv, el": {"attention": "skv"},
        "mla": {"attention": "mla", "query_rank": 384, "latent_dim": 256, "rope_dim": 32},
        "gla, 2 latents": {"attention": "gla", "query_rank": 384, "latent_dim": 256, "rope_dim": 32, "num_latents": 2},
        "gta, 4 groups": {"attention": "gta", "num_kv_heads": 4},
        "tpa, ranks 6, 2, 2": {"attention": "tpa", "query_rank": 6, "key_rank": 2, "value_rank": 2},
        "diff": {"attention": "diff"},
        "diff_v2, 4 groups": {"attention": "diff_v2", "num_kv_heads": 4},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=output_file(".png", ".svg"), metavar="FILE", help="picture to write")
    arguments = parser.parse_args()
    places = {line: {label: place(fields) for label, fields in own.items()} for line, own in LINES.items()}
    for own in places.values():
        for label, (cached, rank) in own.items():
            print(f"{label:<36} {cached:>5} cached values, queries of rank {rank}", flush=True)
    plot(places, arguments.output)


def place(fields: dict[str, Any]) -> tuple[int, int]:
    """Cached values of a layer, and the rank of its queries' derivative."""
    from configs.schema import ModelConfig
    from model.attention.registry import variant_of

    sizes = {"hidden_size": HIDDEN, "num_layers": 1, "num_heads": HEADS, "vocab_size": 1, "position": "rope"}
    config = ModelConfig.model_validate(sizes | fields)
    return variant_of(config).cached(config).values, query_rank(config)


def query_rank(config: Any) -> int:
    """Of d queries / d hidden state at a random token, whose position is 0, where RoPE turns nothing."""
    import torch

    from model.attention.registry import attention_class, rotary_widths
    from model.layers import UNSHARDED
    from model.positions.positions import make_positions

    torch.manual_seed(0)
    layer = attention_class(config)(config, UNSHARDED).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=HIDDEN**-0.5)
    positions = make_positions(config, 1, 0, torch.float64, torch.device("cpu"), rotary_widths=rotary_widths(config))

    def queries(x_H: torch.Tensor) -> torch.Tensor:
        q_BNSD = layer.queries(x_H.view(1, 1, -1), positions)
        features: torch.Tensor = layer.query_features(q_BNSD, layer.own_rows(), positions)
        return features.flatten()

    jacobian = torch.autograd.functional.jacobian(queries, torch.randn(HIDDEN, dtype=torch.float64))
    assert isinstance(jacobian, torch.Tensor)
    return int(torch.linalg.matrix_rank(jacobian))


def plot(places: dict[str, dict[str, tuple[int, int]]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 6.5), layout="constrained")
    start = places["one head of keys: queries grow freer"]["mhe_add, mhe_mul"]
    for line, own in places.items():
        points = list(own.values())
        if line:
            joined = points if start in points else [start, *points]
            axis.plot(*zip(*joined, strict=True), "o-", label=line, markersize=7)
        else:
            axis.plot(*zip(*points, strict=True), "o", color="0.35", label="neighbours", markersize=7)
        for label, point in own.items():
            below = label in BELOW
            axis.annotate(
                label,
                point,
                xytext=(6, -13 if below else 7),
                textcoords="offset points",
                fontsize=9,
                ha=SIDES.get(label, "left"),
            )
    axis.set_xscale("log", base=2)
    ticks = [128, 256, 512, 768, 1536]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set(
        xlim=(105, 2300), ylim=(0, 850), xlabel="cached values of a token and layer", ylabel="rank of the queries of all heads"
    )
    axis.set_title(f"{HEADS} heads of {HIDDEN // HEADS}, hidden state of {HIDDEN}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=9)
    figure.savefig(output, dpi=110)


BELOW = {"sha", "gla, 2 latents", "mha = 12 seeds without embeddings", "gta, 4 groups"}  # labels that would cover others
SIDES = {"mha = 12 seeds without embeddings": "right", "diff": "left", "mqa": "left"}

if __name__ == "__main__":
    run_command(main)
