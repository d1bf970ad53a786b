"""All attention variants side by side at equal cost: `python benchmarks/variants.py --json docs/benchmarks/variants.json`.

A small model of the configuration, with as many parameters as the first contender's (mha): the MLP takes the difference. Of
each contender: a training step with the Trainer of launch/pretrain.py and its peak memory, as benchmarks/training.py measures
them; the bytes that a token adds to the cache, counted from its tensors; and a step of greedy generation after a prompt.
Contenders take turns, step by step and round by round; figures are medians. A variant that the configuration cannot have is
left out, and said so.

JSON: a row a line, written after each part: variant, model (its fields), parameters, ffn_hidden_size, sequence_length,
global_batch_size, threads, device; median_s, min_s, runs, tokens_per_second and ours of a training step, peak_bytes,
cache_bytes, prefill_s, decode_s (of one step of the batch); and to_first, the ratios of these to the first contender's.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.arguments import VARIANTS_HELP, variants_of
from benchmarks.contenders import equal, load_contender
from benchmarks.training import in_turns, measure_peak, on_prepared
from configs.errors import UserError
from configs.schema import Config
from launch.common import output_file, run_command, whole_number
from model.costs.solve import COSTS
from pretrain.matching import vocabulary_of

SETTINGS = (  # heads that are together as wide as the model, which `el` needs
    "--model.hidden_size=256",
    "--model.num_layers=3",
    "--model.num_heads=32",
    "--model.head_dim=8",
    "--model.position=rope",
    "--data.sequence_length=256",
    "--training.micro_batch_size=4",
    "--training.global_batch_size=4",
)
VARIANTS = "all,mhe_add:num_seeds=4,mhe_mul:num_seeds=4"
COMPARED = ("median_s", "peak_bytes", "cache_bytes", "prefill_s", "decode_s")
Rows = dict[str, dict[str, Any]]


def load(arguments: argparse.Namespace, overrides: list[str], scratch: Path) -> dict[str, Config]:
    """The contenders' configurations, of equal cost, on prepared data; those that the configuration cannot have left out."""
    configs = {}
    for name in variants_of(arguments.variants):
        try:
            configs[name] = load_contender(arguments.config, [*SETTINGS, *overrides], name)
        except UserError as error:
            if not configs:
                raise  # of the first all others are measured
            print(f"left out: {name}: {str(error).splitlines()[-1].strip()}", file=sys.stderr)
    first, *others = on_prepared(configs, scratch).items()
    matched = dict([first])
    for other in others:
        try:
            matched |= equal(dict([first, other]), arguments.match)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return matched


def build(config: Config) -> Any:
    """The model, with initial weights, ready to generate."""
    import torch

    from model.decoder import DecoderLM
    from model.initialization import init_weights

    model = DecoderLM(config.resolved(vocabulary_of(config)).model)
    init_weights(model, 1)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def generate(model: Any, prompt_BS: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first token, and for each after it."""
    import torch

    from model.generation import generate as tokens_of

    def now() -> float:
        if prompt_BS.is_cuda:
            torch.cuda.synchronize()
        return perf_counter()

    started, tokens = now(), tokens_of(model, prompt_BS, new_tokens + 1, temperature=0)
    next(tokens)
    prefilled = now()
    for _ in tokens:
        pass
    return prefilled - started, (now() - prefilled) / new_tokens


def cache_bytes(model: Any, prompt_BS: Any) -> int:
    """What a token of a sequence has in the cache, counted after a prompt."""
    import torch

    batch, length = prompt_BS.shape
    cache = model.new_cache(batch, length)
    with torch.inference_mode():
        model.logits(prompt_BS, cache=cache, last_only=True)
    kept = [tensor for layer in cache.layers for tensor in (layer.k_BKSD, layer.v_BKSD)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept) // (batch * length)


def decode(configs: dict[str, Config], arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cache and generation of each contender, in turns; `decode_error` of one that cannot generate."""
    import torch

    models, found = {name: build(config) for name, config in configs.items()}, {}
    ids = torch.randint(4, 100, (arguments.batch, arguments.prompt), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for name, model in models.items():
        prompt_BS = ids.to(next(model.parameters()).device)
        try:
            generate(model, prompt_BS, 2)
            found[name] = {"cache_bytes": cache_bytes(model, prompt_BS)}
        except (UserError, NotImplementedError) as error:
            yield name, {"decode_error": str(error)}
    for _ in range(arguments.rounds):
        for name in found:
            times[name].append(generate(models[name], prompt_BS, arguments.new_tokens))
    for name, figures in found.items():
        prefill_s, decode_s = (median(column) for column in zip(*times[name], strict=True))
        yield name, {**figures, "prefill_s": prefill_s, "decode_s": decode_s}


def write(path: Path | None, rows: Rows) -> None:
    """A row a line, with ratios to the first where both have the figure."""
    first = next(iter(rows.values()))
    for row in rows.values():
        row.pop("to_first", None)  # so that it comes last
        row["to_first"] = {key: row[key] / first[key] for key in COMPARED if key in row and key in first}
    if path is not None:
        lines = ",\n".join(json.dumps(row) for row in rows.values())
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def table(rows: Rows) -> str:
    width = max(map(len, rows))
    lines = [
        f"{'':<{width}} {'parameters':>10} {'MLP':>5} {'step ms':>15} {'peak MiB':>14} {'cache bytes':>14} {'decode ms':>15}"
    ]
    for name, row in rows.items():
        cells = [
            _cell(row, "median_s", 1e3, 8, ".1f"),
            _cell(row, "peak_bytes", 2**-20, 7, ",.0f"),
            _cell(row, "cache_bytes", 1, 7, ",.0f"),
            _cell(row, "decode_s", 1e3, 8, ".2f"),
        ]
        lines.append(f"{name:<{width}} {row['parameters'] / 1e6:>8.2f} M {row['ffn_hidden_size']:>5} {' '.join(cells)}")
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str, unit: float, width: int, form: str) -> str:
    """A figure, and how many times that of the first it is."""
    if key not in row:
        return f"{'–':>{width + 7}}"
    return f"{format(row[key] * unit, form):>{width}} {row['to_first'][key]:>5.2f}x"


def measure(configs: dict[str, Config], arguments: argparse.Namespace, scratch: Path) -> Rows:
    """All figures; what there is already is written after each part."""
    rows: Rows = {name: row_of(name, config, arguments.threads or os.cpu_count()) for name, config in configs.items()}
    for name, config in configs.items():  # first, since a process inherits the peak of the one that starts it
        rows[name]["peak_bytes"] = measure_peak(config, scratch / "peak" / name)
        write(arguments.json, rows)
    for row in in_turns(configs, scratch / "speed", arguments.steps):
        rows[row["variant"]] |= row
    write(arguments.json, rows)
    for name, figures in decode(configs, arguments):
        rows[name] |= figures
    write(arguments.json, rows)
    return rows


def row_of(name: str, config: Config, threads: int | None) -> dict[str, Any]:
    """What is known before anything is measured."""
    import torch

    from pretrain.report.devices import device_name

    row = {"variant": name, "model": config.model.model_dump(exclude_defaults=True), "ffn_hidden_size": config.model.ffn_width}
    row |= {"sequence_length": config.data.sequence_length, "global_batch_size": config.training.global_batch_size}
    return row | {"threads": threads, "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=VARIANTS, metavar="A,B", help=f"{VARIANTS_HELP}; default: %(default)s")
    parser.add_argument("--config", default="configs/quickstart_cpu.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--match", choices=COSTS, default="parameters", help="what is equal; default: %(default)s")
    counts = {"steps": (20, "training steps"), "rounds": (5, "rounds of generation"), "batch": (8, "prompts")}
    counts |= {"prompt": (192, "tokens of a prompt"), "new-tokens": (32, "tokens after the first")}
    for name, (default, what) in counts.items():
        parser.add_argument(f"--{name}", type=whole_number(1), default=default, metavar="N", help=f"{what}; default: {default}")
    parser.add_argument("--threads", type=whole_number(1), metavar="N", help="default: all cores")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
    arguments, overrides = parser.parse_known_args()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    with tempfile.TemporaryDirectory() as scratch:
        configs = load(arguments, overrides, Path(scratch))
        first = next(iter(configs.values()))
        print(
            f"{first.model.num_layers} layers × {first.model.hidden_size}, {first.model.num_heads} heads × "
            f"{first.model.head_width}, {first.training.global_batch_size} × {first.data.sequence_length} tokens, "
            f"{first.training.precision}, equal {arguments.match}, {arguments.threads or os.cpu_count()} threads, "
            f"{platform.machine()}, medians of {arguments.steps} steps and {arguments.rounds} rounds",
            flush=True,
        )
        print(table(measure(configs, arguments, Path(scratch))))


if __name__ == "__main__":
    run_command(main, one_process=True)
