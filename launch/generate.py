"""Write text with a checkpoint: `python launch/generate.py runs/quickstart_cpu --prompt "def main("`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, so that `pretrain` is the package, not pretrain.py

import argparse

from launch.common import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run's folder (its newest checkpoint) or one checkpoint folder"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to go on from; empty: a new document")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="at most so many tokens")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that together reach P only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed draws the same text")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1 or arguments.temperature < 0:
        parser.error("--max-new-tokens must be at least 1, --temperature at least 0")
    if (arguments.top_k is not None and arguments.top_k < 1) or (arguments.top_p is not None and not 0 < arguments.top_p <= 1):
        parser.error("--top-k must be at least 1, --top-p above 0 and at most 1")

    from pretrain.inference import generate_text  # imports torch: only once the arguments are sound

    print(arguments.prompt, end="", flush=True)
    for piece in generate_text(
        Path(arguments.checkpoint),
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    ):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_command(main)
