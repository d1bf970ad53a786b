"""List, check, compare, average and copy checkpoints: `python launch/checkpoint.py ls runs/NAME`.

A checkpoint is named by its folder, or by that of its run for the newest. A folder is a path, or an
address that fsspec knows, such as s3://BUCKET/FOLDER. docs/checkpoint_tool.md shows each command.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse
import signal

from configs.errors import UserError
from configs.words import counted
from launch.common import number, run_command, whole_number
from pretrain.checkpoints.storage import local_path, place

CHECKPOINT = "a checkpoint's folder, or a run's for its newest; a path, or an address such as s3://BUCKET/FOLDER"


def main() -> int | None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing half-written is left
    try:
        return COMMANDS[arguments.command](arguments)
    except BrokenPipeError:
        raise
    except OSError as error:  # such as a name that is too long, or a folder that may not be looked into
        trouble = UserError(f"{error.filename}: {error.strerror}")
    except UserError as error:
        trouble = error
    if arguments.command != "diff":
        raise trouble
    print(f"error: {trouble}", file=sys.stderr)
    return 2  # 1 would say that they differ


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, words: str, *checkpoints: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        for checkpoint in checkpoints:
            own.add_argument(checkpoint.lower(), metavar=checkpoint, help=CHECKPOINT)
        return own

    own = add("ls", "list the checkpoints of a run: step, size, when, layout, and whether each is complete")
    own.add_argument(
        "folder", metavar="RUN_OR_FOLDER", help="a run's folder, any other with checkpoints in it, or a checkpoint"
    )
    add("verify", "read all of a checkpoint and name every fault; exit status 1 if there is one", "CHECKPOINT")
    own = add("diff", "what differs between two checkpoints; exit status 0: nothing, 1: something, 2: an error", "A", "B")
    own.add_argument(
        "--top", type=whole_number(1), default=20, metavar="N", help="at most so many tensors of a kind (default: %(default)s)"
    )
    own = add("show", "list all tensors, or show one: its type, figures, parts and values", "CHECKPOINT")
    own.add_argument("name", nargs="?", metavar="TENSOR", help="KIND/NAME as the list has it (default: the list)")
    own.add_argument("--slice", metavar="A:B,C:D", help="print these values of TENSOR, too, such as 0:2,3:5 (default: none)")
    own = add("merge", "write an average of weights as a new run, to be evaluated, used or exported, not resumed")
    own.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=f"two or more; each {CHECKPOINT}")
    own.add_argument(
        "--output", required=True, type=local_path, metavar="RUN", help="the new run's folder, which must not exist"
    )
    own.add_argument(
        "--shares",
        type=shares,
        metavar="S,S,…",
        help="how much each counts, such as 2,1,1; they are divided by their sum (default: all alike)",
    )
    own = add("copy", "copy a checkpoint, complete or not at all, verified", "CHECKPOINT")
    own.add_argument("target", metavar="TARGET", help="the new checkpoint's folder, a path or an address; it must not exist")
    own.add_argument("--overwrite", action="store_true", help="replace a checkpoint at TARGET (default: an error)")
    arguments = parser.parse_args()
    _check(parser, arguments)
    return arguments


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.command == "show" and arguments.slice is not None and arguments.name is None:
        parser.error("--slice needs a TENSOR")
    if arguments.command == "merge":
        count = len(arguments.checkpoints)
        if count < 2:
            parser.error("merge needs two checkpoints or more")
        if arguments.shares is not None and len(arguments.shares) != count:
            parser.error(f"--shares: {len(arguments.shares)} for {count} checkpoints")


def shares(text: str) -> list[float]:
    """Positive numbers, for argparse."""
    return [number(1e-9, 1e9)(part) for part in text.split(",")]


def ls(arguments: argparse.Namespace) -> None:
    from pretrain.checkpoints.tools.listing import listing

    print(listing(place(arguments.folder)))


def verify(arguments: argparse.Namespace) -> int:
    from pretrain.checkpoints.tools.verify import find_checkpoint, verify_all

    folder = find_checkpoint(arguments.checkpoint)
    faults, held = verify_all(folder)
    print("\n".join([*faults, f"{folder}: {counted(len(faults), 'fault') if faults else 'undamaged'}, {held}"]))
    return 1 if faults else 0


def diff(arguments: argparse.Namespace) -> int:
    from pretrain.checkpoints.tools.diff import diff
    from pretrain.checkpoints.tools.verify import find_checkpoint

    lines = diff(find_checkpoint(arguments.a), find_checkpoint(arguments.b), arguments.top)
    print("\n".join(lines), end="\n" if lines else "")
    return 1 if lines else 0


def show(arguments: argparse.Namespace) -> None:
    from pretrain.checkpoints.tools.show import show_list, show_tensor
    from pretrain.checkpoints.tools.verify import find_checkpoint

    folder = find_checkpoint(arguments.checkpoint)
    print(show_list(folder) if arguments.name is None else show_tensor(folder, arguments.name, arguments.slice))


def merge(arguments: argparse.Namespace) -> None:
    from pretrain.checkpoints.tools.verify import find_checkpoint

    sources = [find_checkpoint(text) for text in arguments.checkpoints]
    from pretrain.checkpoints.tools.merge import merge  # imports torch: only once the arguments are sound

    print(f"written {merge(sources, arguments.shares or [1.0] * len(sources), arguments.output)}")


def copy(arguments: argparse.Namespace) -> None:
    from pretrain.checkpoints.tools.copy import copy
    from pretrain.checkpoints.tools.verify import find_checkpoint
    from pretrain.checkpoints.tools.words import size_words

    target = place(arguments.target)
    marker = copy(find_checkpoint(arguments.checkpoint), target, arguments.overwrite)
    total = sum(file.bytes for file in marker.files.values())
    print(f"written {target}: {counted(len(marker.files), 'file')}, {size_words(total)}")


COMMANDS = {command.__name__: command for command in (ls, verify, diff, show, merge, copy)}


if __name__ == "__main__":
    run_command(main, one_process=True)
