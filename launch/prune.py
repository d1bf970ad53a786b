"""Prune the heads that lost an election: `python launch/prune.py runs/NAME` writes runs/NAME/pruned.

The vote comes first and writes runs/NAME/gha/election.json:
`deepspeed launch/pretrain.py --config … --gha.stage=vote --resume=auto`.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse

from launch.common import run_command, whole_number
from pretrain.checkpoints.storage import local_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint",
        type=local_path,
        metavar="CHECKPOINT_OR_RUN",
        help="a run's folder (its checkpoint of the step that was voted on) or one checkpoint folder, of any layout",
    )
    parser.add_argument("--election", type=Path, metavar="FILE", help="result of the vote (default: RUN/gha/election.json)")
    parser.add_argument(
        "--output", type=Path, metavar="RUN_FOLDER", help="empty or new folder of the pruned run (default: RUN/pruned)"
    )
    parser.add_argument(
        "--tensor",
        type=whole_number(1, 2**10),
        metavar="T",
        help="parallel.tensor of the pruned run, if fewer heads need fewer ranks (default: unchanged)",
    )
    arguments = parser.parse_args()

    from pretrain.checkpoints.folder import read_config  # imports torch: only once the arguments are sound
    from pretrain.grouping.prune import prune_run, savings_table

    before, after = prune_run(arguments.checkpoint, arguments.election, arguments.output, arguments.tensor)
    old, new = read_config(before), read_config(after)
    print(savings_table(old.model, new.model))
    print(f"written {after}")
    folder = after.parent.parent
    more = f" --training.steps=N (above {new.training.steps})" if int(after.name[5:]) >= new.training.steps else ""
    print(f"resume  deepspeed launch/pretrain.py --config {folder / 'config.yaml'} --resume=auto{more}")


if __name__ == "__main__":
    run_command(main, one_process=True)
