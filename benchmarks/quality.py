"""What many heads bring: validation loss of attention variants, trained alike: `python benchmarks/quality.py --json FILE`.

Each variant trains twice: at equal width, with everything as in the configuration, and with as many parameters as `mha`, within
0.5 %, the difference going into its MLP (docs/fair_comparisons.md). Every run is `launch/pretrain.py` on one process with one
thread; `--jobs` of them run at once. Reported are the mean and the standard deviation of the last validation loss over seeds,
in nats per token, and the median of tokens per second. Rows are written as they come; a run that is interrupted goes on from
them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean, median, stdev

from benchmarks.arguments import VARIANTS_HELP, variants_of
from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from launch.common import CHECKS, output_file, run_command, whole_number
from launch.contenders import with_contender
from model.costs.parameters import parameters
from model.costs.solve import match
from pretrain.matching import vocabulary_of

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = "mha,mqa,mhe_add,mhe_mul"
SETTINGS = (
    "--model.hidden_size=128",
    "--model.num_heads=32",
    "--model.head_dim=8",
    "--training.steps=160",
    "--schedule.warmup_steps=20",
    "--validation.every_steps=0",
    "--validation.samples=256",
    "--checkpoint.every_steps=0",
    "--logging.tensorboard=false",
)


@dataclass(frozen=True)
class Row:
    """One run. `sizes`: "width" or "parameters", whatever is equal. `loss`: of validation, nats per token."""

    variant: str
    sizes: str
    seed: int
    parameters: int
    steps: int
    loss: float
    tokens_per_second: float


Case = tuple[str, str, int]  # variant, sizes, seed


def resolved(config_path: str, overrides: Sequence[str]) -> Config:
    """A run's configuration with the sizes of its model."""
    config = load_config(config_path, overrides, CHECKS, world_size=1)
    return config.resolved(vocabulary_of(config))


def size(config_path: str, overrides: Sequence[str]) -> int:
    """Parameters of a run's model."""
    return sum(parameters(resolved(config_path, overrides).model).values())


def settings(config_path: str, overrides: Sequence[str], case: Case) -> list[str]:
    """The overrides of one run; for equal parameters with an MLP as wide as that takes."""
    variant, sizes, seed = case
    every = [*SETTINGS, *overrides, f"--run.seed={seed}"]
    of = {name: with_contender(config_path, every, name) for name in ("mha", variant)}
    if sizes == "width" or variant == "mha":
        return of[variant]
    mha, own = (resolved(config_path, of[name]) for name in ("mha", variant))
    found = match(own.model, mha.model, "parameters", own.row_length)
    return [*of[variant], f"--model.ffn_hidden_size={found.config.ffn_width}"]


def train(config_path: str, overrides: Sequence[str], case: Case) -> Row:
    """One run, in a process of its own."""
    own = settings(config_path, overrides, case)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "launch/pretrain.py", "--config", config_path, *own, f"--run.folder={folder}/run"]
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{' '.join(map(str, case))}: {done.stderr.strip().splitlines()[-1]}")
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    loss = next(line["validation/loss"] for line in reversed(lines) if "validation/loss" in line)
    speed = median(line["tokens_per_second"] for line in steps)
    return Row(*case, size(config_path, own), len(steps), loss, round(speed))


def table(rows: Sequence[Row], variants: Sequence[str]) -> Iterator[str]:
    """A line for each variant and size that has rows."""
    width = max(10, *map(len, variants))
    yield f"{'':<{width}} {'equal':<12} {'parameters':>10}  {'validation loss':<20} {'tokens/s':>9}  seeds"
    for sizes, variant in product(("width", "parameters"), variants):
        own = [row for row in rows if (row.variant, row.sizes) == (variant, sizes)]
        if own:
            losses = [row.loss for row in own]
            spread = f" ± {stdev(losses):.3f}" if len(own) > 1 else ""
            speed = median(row.tokens_per_second for row in own)
            millions = f"{own[0].parameters / 1e6:.2f} M"
            loss = f"{mean(losses):.3f}{spread}"
            yield f"{variant:<{width}} {sizes:<12} {millions:>10}  {loss:<20} {speed:>9,.0f}  {len(own)}"


def read(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: holds no rows of this benchmark ({error})") from error


def write(path: Path | None, rows: Sequence[Row]) -> None:
    if path is not None:
        text = ",\n".join(json.dumps(asdict(row)) for row in rows)
        path.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart_cpu.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--variants", default=VARIANTS, metavar="A,B", help=f"{VARIANTS_HELP}; default: %(default)s")
    parser.add_argument("--seeds", type=whole_number(1), default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--jobs", type=whole_number(1), default=2, metavar="N", help="runs at once; default: %(default)s")
    parser.add_argument(
        "--json", type=output_file(".json"), metavar="FILE", help="rows, also those of an interrupted benchmark"
    )
    arguments, overrides = parser.parse_known_args()
    variants, rows = variants_of(arguments.variants), read(arguments.json)
    cases: list[Case] = list(product(variants, ("width", "parameters"), range(arguments.seeds)))
    known = {(row.variant, row.sizes, row.seed) for row in rows}
    size(arguments.config, [*SETTINGS, *overrides])  # faults of the configuration, before anything runs
    with ThreadPoolExecutor(arguments.jobs) as pool:
        # With `mha` equal parameters are equal width.
        missing = [case for case in cases if case not in known and case[:2] != ("mha", "parameters")]
        running = [pool.submit(train, arguments.config, overrides, case) for case in missing]
        try:
            for future in as_completed(running):
                rows.append(future.result())
                write(arguments.json, rows)
                print(f"{len(rows)} runs: {rows[-1]}", flush=True)
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    print("\n".join(table(rows, variants)))


if __name__ == "__main__":
    run_command(main)
