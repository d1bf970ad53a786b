"""Everything that concerns a GPU, in at most ten minutes on one: `python benchmarks/gpu.py --json gpu.json`.

Stages, each with a time limit: machine (copies, matrix products), correctness (attention kernels in bf16 against float64),
resume (bit for bit), attention (against flash, cuDNN, MQA and FlexAttention), training (steps of the 1 B configuration by every
engine that is installed), decoding, fp8. A case that fails is a row with its error, and no stage stops the next one. The JSON
file is complete after every row; output of the stages is in a log beside it. Exit status 1: a kernel or a resumed run is wrong,
or failed. What is not installed is skipped, which counts as passed.

`--device cpu --tiny` rehearses all of it. docs/gpu.md says what is measured and what calculated.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import importlib
import multiprocessing
import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from time import monotonic

from benchmarks.arguments import names
from benchmarks.gpu_stages.runner import Rows, StageRun
from benchmarks.gpu_stages.stages import STAGES, Options, Row, Stage
from benchmarks.gpu_stages.table import page
from configs.errors import UserError
from launch.common import number, output_file, run_command

LIMITS = ", ".join(f"{stage.name} {stage.seconds:g}" for stage in STAGES)


def run(stages: tuple[Stage, ...], options: Options, path: Path) -> list[Row]:
    """Run the stages one after the other; all rows. What a stage leaves of its time is added to the next one's."""
    rows, log = Rows(path), path.with_name(f"{path.stem}.stages.log")
    log.unlink(missing_ok=True)
    context = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
    spare = 0.0
    for stage in stages:
        started, before = monotonic(), len(rows.rows)
        StageRun(replace(stage, seconds=stage.seconds + spare), options, rows.add, log, context).run()
        found, seconds = rows.rows[before:], monotonic() - started
        spare = max(0.0, spare + stage.seconds - seconds)
        failed = sum("error" in row for row in found)
        rows.add({"stage": stage.name, "seconds": seconds})
        print(f"{stage.name}: {len(found)} rows in {seconds:.0f} s{f', {failed} errors' if failed else ''}", flush=True)
    return rows.rows


def verdict(stages: tuple[Stage, ...], rows: list[Row]) -> int:
    """The exit status: 1 if a row of a stage that decides is wrong or could not be measured."""
    deciding = {stage.name for stage in stages if stage.decides}
    return int(any("error" in row or not row.get("ok", True) for row in rows if row["stage"] in deciding))


def share_imports() -> None:
    """Import once what stages need: on a CPU their processes are forks of this one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for a GPU
    engines = ("pretrain.backends.fsdp", "pretrain.backends.deepspeed")
    for module in (*(stage.target.partition(":")[0] for stage in STAGES), *engines):
        with suppress(ModuleNotFoundError):  # a stage says so, too
            importlib.import_module(module)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join(stage.name for stage in STAGES)
    parser.add_argument("--stages", default=every, metavar="A,B", help="default: %(default)s")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal")
    patience = f"multiply every time limit; the limits in seconds: {LIMITS}"
    parser.add_argument("--patience", type=number(0.01, 100), default=1.0, metavar="X", help=patience)
    parser.add_argument("--json", type=output_file(".json"), default="gpu.json", metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    wanted = names(arguments.stages, "stages", tuple(stage.name for stage in STAGES))
    times = arguments.patience
    stages = tuple(
        replace(stage, seconds=stage.seconds * times, case_seconds=stage.case_seconds * times)
        for stage in STAGES
        if stage.name in wanted
    )
    if arguments.device == "cpu":
        if not arguments.tiny:
            raise UserError("--device cpu: only with --tiny; the sizes are those of a GPU")
        share_imports()
    else:
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device; --device cpu --tiny is the rehearsal")
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(stages, Options(arguments.device, arguments.tiny, Path(scratch)), arguments.json)
    rehearsal = "A rehearsal: tiny sizes, whose times and rates say nothing about this machine.\n" if arguments.tiny else ""
    print(f"\n{rehearsal}{page(rows)}\nrows: {arguments.json}")
    return verdict(stages, rows)


if __name__ == "__main__":
    run_command(main, one_process=True)
