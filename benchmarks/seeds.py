"""What several seeds of MHE-ADD cost beside MHA: `python benchmarks/seeds.py --json seeds.json`.

One attention layer with its projections, forward and backward, float32, on one thread. Contenders take turns; figures are
medians of CPU seconds, which other work on the machine changes less than wall time.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import os
import platform
from statistics import median
from time import process_time
from typing import Any

import torch

from benchmarks.arguments import numbers
from configs.errors import UserError
from configs.schema import ModelConfig
from launch.common import output_file, run_command, whole_number
from model.attention.base import Attention
from model.attention.registry import attention_class
from model.faults import model_faults
from model.layers import UNSHARDED
from model.positions.positions import make_positions


def layer_of(config: ModelConfig) -> Attention:
    """A layer with weights of std 0.02."""
    layer: Attention = attention_class(config)(config, UNSHARDED)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    return layer


def seconds_of(layer: Attention, config: ModelConfig, x_SBH: torch.Tensor) -> tuple[float, float]:
    """CPU seconds of the forward pass, and of both."""
    positions = make_positions(config, x_SBH.shape[0], 0, x_SBH.dtype, x_SBH.device)
    hidden_SBH = x_SBH.clone().requires_grad_()
    started = process_time()
    out_SBH = layer(hidden_SBH, positions)
    forward = process_time() - started
    out_SBH.backward(torch.ones_like(out_SBH))
    return forward, process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the figures there, too")
    parser.add_argument("--seeds", default="1,4,8,16", help="numbers of seeds (default: 1,4,8,16)")
    parser.add_argument("--heads", type=whole_number(1, 2**12), default=128, help="heads (default: 128)")
    parser.add_argument(
        "--width", type=whole_number(1, 2**16), default=1024, help="hidden size, of all heads, too (default: 1024)"
    )
    parser.add_argument("--length", type=whole_number(1, 2**16), default=1024, help="tokens (default: 1024)")
    parser.add_argument(
        "--rounds", type=whole_number(1, 1000), default=5, help="rounds of each, after one to warm up (default: 5)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": arguments.width, "num_layers": 1, "num_heads": arguments.heads, "position": "none"}
    contenders = {"mha": ModelConfig(attention="mha", **sizes)}
    for seeds in numbers(arguments.seeds, "seeds"):
        config = ModelConfig(attention="mhe_add", num_seeds=seeds, **sizes)
        if faults := model_faults({"model": config}):
            raise UserError("\n".join(map(str, faults)))
        contenders[f"mhe_add, {seeds} seeds"] = config
    layers = {name: layer_of(config) for name, config in contenders.items()}
    x_SBH = torch.randn(arguments.length, 1, arguments.width)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds + 1):
        for name, config in contenders.items():
            times[name].append(seconds_of(layers[name], config, x_SBH))
    rows: list[dict[str, Any]] = []
    for name in contenders:
        forward, both = (median(column) for column in zip(*times[name][1:], strict=True))
        rows.append({"name": name, "forward_s": forward, "both_s": both})
        faster = [rows[0][key] / rows[-1][key] for key in ("forward_s", "both_s")]
        print(f"{name:<20} forward {forward:7.3f} s, {faster[0]:5.1f} x mha   both {both:7.3f} s, {faster[1]:5.1f} x mha")
    if arguments.json:
        record = {"machine": platform.platform(), "cores": os.cpu_count(), **sizes, "length": arguments.length}
        record |= {"torch": torch.__version__, "rounds": arguments.rounds, "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
