"""Loss, perplexity and bits per byte of a checkpoint on prepared text: `python launch/evaluate.py runs/quickstart_cpu`.

With --tasks its scores in multiple-choice tasks instead.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse
import json

from configs.errors import UserError
from launch.common import add_weights, output_file, run_command, whole_number
from pretrain.checkpoints.storage import local_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "checkpoint",
        type=local_path,
        metavar="CHECKPOINT",
        help="a run's folder (its newest checkpoint) or one checkpoint folder",
    )
    parser.add_argument("--data", metavar="FOLDER", help="folder written by launch/prepare.py; by default the run's own sets")
    parser.add_argument(
        "--tasks",
        nargs="*",
        metavar="FILE",
        help="score these files of multiple-choice questions, or without FILE the run's own tasks (docs/validation.md)",
    )
    parser.add_argument("--split", choices=["train", "valid", "test"], default="valid", help="which documents of the data")
    parser.add_argument("--samples", type=whole_number(1), metavar="N", help="at most so many sequences; by default all")
    parser.add_argument("--batch-size", type=whole_number(1), default=8, metavar="N", help="sequences of one forward pass")
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write the figures there, too")
    add_weights(parser)
    arguments = parser.parse_args()
    if arguments.tasks is not None and (arguments.data is not None or arguments.samples is not None):
        parser.error("--tasks: scores no text; leave out --data and --samples, or run the command twice")
    if len({Path(file).stem for file in arguments.tasks or ()}) < len(arguments.tasks or ()):
        parser.error("--tasks: two files have one name, by which figures are called; rename one")

    from pretrain.inference import evaluate_checkpoint, score_tasks  # imports torch: only once the arguments are sound

    checkpoint, which, batch_size = arguments.checkpoint, arguments.weights, arguments.batch_size
    if arguments.tasks is not None:
        figures = score_tasks(checkpoint, arguments.tasks, batch_size, which)
    else:
        figures = evaluate_checkpoint(checkpoint, arguments.data, arguments.split, arguments.samples, batch_size, which)
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        style = {float: ",.4f", int: ","}.get(type(value), "")
        print(f"{name:<{width}}  {value:{style}}")
    if arguments.json:
        try:
            arguments.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:  # it could be written before the evaluation
            raise UserError(f"{arguments.json}: cannot be written ({error.strerror}); the figures are above") from error


if __name__ == "__main__":
    run_command(main, one_process=True)
