"""Compare two to ten runs: `python launch/compare.py runs/mha runs/mhe_add --output runs/compared.html`.

Prints in which fields their configurations differ, what each model costs, and losses at equal tokens and at equal time.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of launch/

import argparse

from configs.durable import write_text
from configs.errors import UserError
from launch.common import output_file, run_command
from pretrain.studies.compare import MOST, page, read_runs, terminal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=f"folders of runs, from two to {MOST}")
    parser.add_argument("--output", type=output_file(".html"), metavar="FILE", help="also write a page with curves, .html")
    arguments = parser.parse_args()
    runs = arguments.runs
    if not 2 <= len(runs) <= MOST:
        parser.error(f"{len(runs)} runs: name two to {MOST}; a study of more is compared by launch/sweep.py report")
    part = read_runs(runs)
    print("\n".join(terminal(part, runs)))
    if arguments.output:
        try:
            write_text(arguments.output, page(part, runs))
        except OSError as error:
            raise UserError(f"{arguments.output}: cannot be written ({error.strerror}); name another file") from error
        print(f"written {arguments.output}")


if __name__ == "__main__":
    run_command(main, one_process=True)
