"""Shared by all commands: arguments of a run's configuration, and how errors reach the user."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from configs import launcher
from configs.document import help_text
from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from data_pipeline.faults import data_faults
from data_pipeline.read.task_file import task_faults
from data_pipeline.stream.faults import stream_faults
from launch.match import add_match, check_match, matched
from model.attention.registry import attention_names
from model.faults import model_faults
from model.gha.faults import gha_faults
from model.parallel.faults import tensor_faults
from model.registry import model_kinds
from pretrain.engines import engine_faults
from pretrain.objectives.registry import objective_faults, objective_names
from pretrain.optim.registry import optimizer_faults

NAMES_HELP = "\n\n" + "\n".join(
    textwrap.fill(f"values of {field}: {', '.join(names)}", 98, subsequent_indent="  ")
    for field, names in (
        ("model.kind", model_kinds()),
        ("model.attention", attention_names()),
        ("training.objective", objective_names()),
    )
)
RULES = (model_faults, gha_faults, tensor_faults, engine_faults, optimizer_faults, objective_faults)  # they read no data
CHECKS = (*RULES, data_faults, stream_faults, task_faults)
INTERRUPTED = 130  # exit status of a command that a signal ended


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The option of commands that use a checkpoint: which of its weights."""
    parser.add_argument(
        "--weights",
        choices=("trained", "average"),
        default="trained",
        help="the weights that training stood at, or their average (training.average); default: trained",
    )


def whole_number(smallest: int, largest: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: whole numbers in a range."""

    def parse(text: str) -> int:
        number = int(text)
        if not smallest <= number <= largest:
            raise argparse.ArgumentTypeError(f"{number} is not between {smallest} and {largest}")
        return number

    parse.__name__ = "whole number"  # argparse names it in "invalid … value"
    return parse


def number(smallest: float, largest: float) -> Callable[[str], float]:
    """An argparse type: finite numbers in a range."""

    def parse(text: str) -> float:
        value = float(text)
        if not smallest <= value <= largest:
            raise argparse.ArgumentTypeError(f"{text} is not between {smallest} and {largest}")
        return value

    parse.__name__ = "number"
    return parse


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """An argparse type: a writable file, with one of `suffixes` if any are given. Its folder must exist.

    UserError otherwise, so that a command ends before it has worked for nothing.
    """

    def parse(text: str) -> Path:
        path, target = Path(text), Path(os.path.realpath(text))  # probe what a link names, and leave the link alone
        if suffixes and path.suffix not in suffixes:
            raise UserError(f"{text}: must end in {' or '.join(suffixes)}")
        try:
            if not target.parent.is_dir():
                raise UserError(f"{text}: no such folder; make it, or name another file")
            new = not os.path.lexists(target)
            if new or target.is_file() or target.is_dir() or target.is_symlink():  # opening a pipe could wait for its reader
                target.open("x" if new else "a").close()
            if new:
                target.unlink()
        except OSError as error:
            raise UserError(f"{text}: cannot be written ({error.strerror}); name another file") from error
        return path

    return parse


def output_folder(text: str) -> Path:
    """An argparse type: a writable folder, created if it does not exist; UserError otherwise."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=text):
            pass
    except OSError as error:
        raise UserError(f"{text}: cannot be written ({error.strerror}); name another folder") from error
    return Path(text)


def run_command(main: Callable[[], int | None], one_process: bool = False) -> None:
    """End with the status that `main` returns, if any; a UserError becomes `error: …` on standard error and exit status 1.

    `one_process`: the command runs without ranks and rejects WORLD_SIZE above 1.
    """
    for stream in (sys.stdout, sys.stderr):  # what the terminal's encoding lacks is written as \\x…
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # another file has taken the place of the one that it was opened for
                stream.reconfigure(errors="backslashreplace")
    status = _status(main, one_process)
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(status)  # at a normal exit, threads of process groups sometimes abort the process
    if status:
        sys.exit(status)


def _status(main: Callable[[], int | None], one_process: bool) -> int:
    try:
        launcher.check_launcher()
        if one_process and launcher.world_size() > 1:
            raise UserError("this command runs in one process, whatever the layout of a checkpoint: start it with python")
        return main() or 0
    except UserError as error:
        rank = int(text) if (text := os.environ.get("RANK", "0")).isdecimal() else 0
        if rank > 0:
            time.sleep(5)  # rank 0 reports an error that all ranks share; its exit ends this process meanwhile
        print(f"error: {'' if rank == 0 else f'[rank {rank}] '}{error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class ConfigArguments(argparse.ArgumentParser):
    """A parser of `--config FILE`, `--section.field=value` overrides and `--match`; `--help` lists every field."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, epilog=help_text() + NAMES_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as configs/quickstart_cpu.yaml")
        add_match(self)

    def parse(self) -> tuple[argparse.Namespace, Config]:
        """Arguments and the validated configuration; usage errors exit with status 2, faults of the file raise ConfigError."""
        arguments, rest = self.parse_known_args()
        overrides = [text for text in rest if text.startswith("--") and "=" in text]
        unknown = [text for text in rest if text not in overrides]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)} (an override is written --section.field=value)")
        check_match(self, arguments)
        config = load_config(arguments.config, overrides, checks=CHECKS)
        return arguments, matched(config, arguments, RULES) if arguments.match else config
