"""Pretrain a language model: `deepspeed launch/pretrain.py --config configs/quickstart_cpu.yaml`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse
import os
import re
import signal

from launch.common import INTERRUPTED, ConfigArguments, run_command
from pretrain.checkpoints.folder import CHECKPOINTS, check_unused
from pretrain.checkpoints.storage import local_path
from pretrain.engines import engine
from pretrain.loop.lock import check_free
from pretrain.loop.profiled_steps import SYNTAX, ProfiledSteps


def main() -> int | None:
    parser = ConfigArguments(
        "Pretrain a language model, under `deepspeed`, under `torchrun`, or as plain `python` on one process.\n"
        "Ctrl-C saves a checkpoint and ends with status 130; SIGTERM does so, too, with status 0."
    )
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|step:N|FOLDER",
        help="auto: resume from this run's newest undamaged checkpoint, or start if there is none; "
        "step:N: go back to this run's checkpoint of step N, and move later ones aside; "
        "FOLDER: from that checkpoint or run (default: none)",
    )
    parser.add_argument(
        "--profile",
        metavar=SYNTAX,
        help="write a trace of these optimizer steps and show where their time went by part; memory: note all allocations on "
        "GPUs, too; ranks=all: of every rank, not of one copy of the model (docs/profiling.md)",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; the environment says the same
    arguments, config = parser.parse()

    if not arguments.resume:
        parser.error("--resume: is empty; pass auto, none, step:N or a folder")
    if arguments.resume.startswith("step:") and not re.fullmatch(r"step:\d{1,9}", arguments.resume):
        parser.error(f"--resume={arguments.resume}: a step is a whole number, such as step:200")
    profiled = None
    if arguments.profile is not None:
        try:
            profiled = ProfiledSteps.parse(arguments.profile, config.training.steps)
        except ValueError as error:
            parser.error(f"--profile={arguments.profile}: {error}")
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler reads it once: no notes of its own on standard error
    arguments.resume = str(local_path(arguments.resume))
    if arguments.resume == "none":
        check_free(Path(config.run.folder))  # no rank locks it before all have come this far
        check_unused(Path(config.run.folder) / CHECKPOINTS)
    if config.parallel.tensor > 1 and engine(config.backend).ordered_kernels:  # CUDA reads it once, at its start
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from pretrain.run import pretrain  # imports torch: only once the configuration is sound

    return INTERRUPTED if pretrain(config, arguments.resume, profiled=profiled) == signal.SIGINT else None


if __name__ == "__main__":
    run_command(main)
