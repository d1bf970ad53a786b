"""Speed of the data pipeline, in parts: `python benchmarks/data.py loading --json data_loading.json`.

preparing: encoding and all of prepare. contenders: prepare beside what one would write. loading: what a training step waits for
its batches. start: how long a run of a billion tokens takes to its first batch. packing: what each way of packing costs and
wastes. `python benchmarks/data.py PART --help` has the options of a part.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

import argparse
import json
import os
import platform

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for either library

from benchmarks import data_contenders, data_loading, data_packing, data_preparing, data_start
from launch.common import output_file, run_command

PARTS = {
    "preparing": data_preparing,
    "contenders": data_contenders,
    "loading": data_loading,
    "start": data_start,
    "packing": data_packing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        its = parts.add_parser(name, description=part.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        its.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write the rows there, too")
        part.add_arguments(its)
    arguments = parser.parse_args()
    rows = PARTS[arguments.part].rows(arguments)
    for row in rows:
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items()))
    if arguments.json:
        record = {"machine": platform.platform(), "cores": os.cpu_count(), "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
