"""Cut the heads that a vote sends away out of a checkpoint: `python launch/prune.py runs/NAME` writes runs/NAME/pruned."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse

from launch.common import run_command, whole_number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_OR_RUN",
        help="a run's folder (its checkpoint of the step that was voted on) or one checkpoint folder, of any layout",
    )
    parser.add_argument("--election", type=Path, metavar="FILE", help="result of the vote (default: RUN/gha/election.json)")
    parser.add_argument("--output", type=Path, metavar="RUN_FOLDER", help="folder of the pruned run (default: RUN/pruned)")
    parser.add_argument(
        "--tensor",
        type=whole_number(1, 2**10),
        metavar="T",
        help="parallel.tensor of the pruned run, where fewer heads want fewer ranks (default: as it was)",
    )
    arguments = parser.parse_args()

    from pretrain.checkpoint import read_config  # imports torch: only once the arguments are sound
    from pretrain.prune import figures, prune_run

    before, after = prune_run(Path(arguments.checkpoint), arguments.election, arguments.output, arguments.tensor)
    whole, left = read_config(before), read_config(after)
    print(f"{'':<26}  {'before':>16}  {'after':>16}  saved")
    for name, old, new in figures(whole.model, left.model):
        print(f"{name:<26}  {old:>16,}  {new:>16,}  {1 - new / old:.1%}")
    print(f"written {after}")
    folder = after.parent.parent
    more = f" --training.steps=N (above {left.training.steps})" if int(after.name[5:]) >= left.training.steps else ""
    print(f"go on   deepspeed launch/pretrain.py --config {folder / 'config.yaml'} --resume=auto{more}")


if __name__ == "__main__":
    run_command(main, one_process=True)
