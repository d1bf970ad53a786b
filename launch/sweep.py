"""Run a study: `python launch/sweep.py STUDY.yaml`. docs/studies.md shows how to write one.

A study trains many models that differ in what it says, as ordinary runs, several at once; it resumes where it was.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse
import shlex
import signal

from configs.errors import UserError
from launch.common import CHECKS, INTERRUPTED, RULES, output_folder, run_command, whole_number
from pretrain.loop.lock import run_lock
from pretrain.studies import machine
from pretrain.studies.children import Checker, Child, child_id
from pretrain.studies.report import report
from pretrain.studies.screen import Screen, listing
from pretrain.studies.study import Study, read_study
from pretrain.studies.sweep import Sweep, failures

BUSY = "{folder}: is in use by {holder}; wait until that sweep ends, or stop it"


def main() -> int | None:
    arguments = parse_arguments(sys.argv[1:])
    return COMMANDS[arguments.command](arguments)


def parse_arguments(words: list[str]) -> argparse.Namespace:
    """`run` is meant if the first word is no command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        own.add_argument("study", metavar="STUDY.yaml", help="the study's file, such as configs/studies/heads_cpu.yaml")
        own.add_argument("--part", action="append", metavar="NAME", help="only this part; may be given again (default: all)")
        return own

    own = add("run", "run all children that have not finished (the default command)")
    own.add_argument("--jobs", type=whole_number(1, 1024), metavar="N", help="children at once (default: what the study says)")
    own.add_argument("--leave-failed", action="store_true", help="do not try failed children again (default: resume them)")
    own.add_argument("--child", type=whole_number(1), metavar="N", help="only the child of this number in the list")
    own.add_argument("--srun", action="store_true", help="with --child: start its processes as tasks of this Slurm job")
    own = add("list", "check all children, and list them with parameters, steps, tokens and FLOPs")
    own.add_argument("--commands", action="store_true", help="print the command of each child instead")
    own = add("report", "collect what the study has brought so far: a table here, CSV, JSON and a page with plots")
    own.add_argument("--output", type=output_folder, metavar="DIR", help="folder of the files (default: report in the study's)")
    if words and words[0] not in COMMANDS and words[0] not in ("-h", "--help"):
        words = ["run", *words]
    arguments = parser.parse_args(words)
    if arguments.command == "run" and arguments.srun and arguments.child is None:
        parser.error("--srun: only with --child N")
    return arguments


def run(arguments: argparse.Namespace) -> int | None:
    study, children = checked(arguments)
    if arguments.child is not None:
        sweep = one_child(children, arguments.child, study, arguments.srun)
        stopped_by = sweep.run()
    else:
        sweep = Sweep(children, machine.shares(arguments.jobs or study.jobs, study.processes), Screen(), study.hours)
        output_folder(str(study.folder))
        with run_lock(study.folder, busy=BUSY):
            stopped_by = sweep.run(arguments.leave_failed)
    trouble = failures(sweep)
    if stopped_by is None and trouble is not None:
        raise trouble
    if trouble is not None:
        print(trouble)
    return INTERRUPTED if stopped_by == signal.SIGINT else None


def one_child(children: list[Child], number: int, study: Study, srun: bool) -> Sweep:
    """A sweep of one child, beside others of the same study that run elsewhere."""
    chosen = [child for child in children if child.number == number]
    if not chosen:
        raise UserError(f"--child {number}: launch/sweep.py list {study.path} shows the numbers there are")
    shares = [machine.Share(1)] if srun else machine.shares(1, study.processes)
    return Sweep(chosen, shares, Screen(), srun=srun, notes_time=False)


def list_children(arguments: argparse.Namespace) -> None:
    study, children = checked(arguments)
    if arguments.commands:
        launcher = machine.launcher(study.processes)
        print("\n".join(shlex.join([*launcher, *child.arguments]) for child in children))
    else:
        print(listing(children))


def write_report(arguments: argparse.Namespace) -> None:
    study = asked(arguments)
    parts = [part for part in study.parts if not arguments.part or part.name in arguments.part]
    chosen = {part.name: {child_id(point.named): point.labels for point in part.points} for part in parts}
    for line in report(study.name, study.folder, chosen, arguments.output):
        print(line, flush=True)


def asked(arguments: argparse.Namespace) -> Study:
    """The study of a file, which has the parts that are asked for."""
    study = read_study(arguments.study)
    unknown = [name for name in arguments.part or () if name not in [part.name for part in study.parts]]
    if unknown:
        raise UserError(f"--part {unknown[0]}: {arguments.study} has {', '.join(part.name for part in study.parts)}")
    return study


def checked(arguments: argparse.Namespace) -> tuple[Study, list[Child]]:
    """The study and the chosen children of it; those of other parts are checked, too."""
    study = asked(arguments)
    data_checks = [check for check in CHECKS if check not in RULES]
    children = Checker(study, RULES, data_checks).children()
    return study, [child for child in children if not arguments.part or child.part in arguments.part]


COMMANDS = {"run": run, "list": list_children, "report": write_report}


if __name__ == "__main__":
    run_command(main, one_process=True)
