"""Write text with a checkpoint: `python launch/generate.py runs/quickstart_cpu --prompt "def main("`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse

from launch.common import add_weights, number, run_command, whole_number
from pretrain.checkpoints.storage import local_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "checkpoint",
        type=local_path,
        metavar="CHECKPOINT",
        help="a run's folder (its newest checkpoint) or one checkpoint folder",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue; empty: a new document")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=200, metavar="N", help="at most so many tokens")
    parser.add_argument("--temperature", type=number(0, 1e6), default=0.8, metavar="X", help="0: always the likeliest token")
    parser.add_argument("--top-k", type=whole_number(1), metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=number(1e-6, 1), metavar="P", help="draw from the likeliest that together reach P only")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="the same seed draws the same text")
    add_weights(parser)
    arguments = parser.parse_args()

    from pretrain.inference import generate_text, load_model  # imports torch: only once the arguments are sound

    loaded = load_model(arguments.checkpoint, arguments.weights)
    pieces = generate_text(
        loaded,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    first = next(pieces)  # a prompt is shown once the checkpoint has proved sound
    print(f"weights {loaded.weights}, {loaded.folder}", file=sys.stderr, flush=True)
    print(arguments.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main, one_process=True)
