"""Export a checkpoint for other software: `python launch/export.py runs/quickstart_cpu exported`.

stock   an architecture of transformers, vLLM and others, if one computes the same
native  our own class in transformers, with MHE's few parameters
gguf    for llama.cpp
auto    stock if its cache is as small, else native

docs/export.md has the table of architectures.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse
import re
import signal

from data_pipeline.folder import check_new_folder
from launch.common import add_weights, run_command
from pretrain.checkpoints.storage import local_path

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """An argparse type: bytes, such as 5GB or 500MiB."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(B|[KMG]i?B)", text, re.IGNORECASE)
    count = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if count == 0:
        raise argparse.ArgumentTypeError(f"{text}: a number and {', '.join(UNITS)}, such as 5GB")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint",
        type=local_path,
        metavar="CHECKPOINT",
        help="a run's folder (its newest checkpoint) or one checkpoint folder",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="new or empty folder")
    parser.add_argument(
        "--format", choices=("auto", "stock", "native", "gguf"), default="auto", help="see above (default: %(default)s)"
    )
    parser.add_argument(
        "--max-shard-size", type=size, default="5GB", metavar="SIZE", help="largest file of weights (default: %(default)s)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text on which the exported model is compared with the checkpoint (default: pages of Python's documentation)",
    )
    add_weights(parser)
    arguments = parser.parse_args()
    check_new_folder(arguments.output)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing half-written is left
    from pretrain.interop.export import export  # imports torch: only once the arguments are sound

    export(
        arguments.checkpoint,
        arguments.output,
        arguments.format,
        arguments.max_shard_size,
        arguments.text,
        print,
        arguments.weights,
    )


if __name__ == "__main__":
    run_command(main, one_process=True)
