"""Write the data of the lm-eval tasks beside this file from the documentation of the Python that runs it.

`python examples/lm_eval/make_task.py`, then in the same folder, because the tasks name `data/lm_eval/`,
`lm_eval run … --include_path examples/lm_eval --tasks docs_endings,docs_perplexity`. The same Python gives the same files.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from examples.common import interpreter_topics, standard_docstrings
from launch.common import run_command, whole_number

SHORTEST, LONGEST = 12, 32  # words of a docstring that is split in two: a short context must hold it
ENDINGS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/lm_eval"), metavar="DIR", help="folder of the files")
    parser.add_argument(
        "--questions", type=whole_number(1), default=500, metavar="N", help="largest number of questions in docs_endings"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    docstrings = [text for _, text in standard_docstrings()]
    write(arguments.output / "endings.jsonl", questions(docstrings, arguments.questions))
    write(arguments.output / "topics.jsonl", ({"text": text} for text in interpreter_topics()))


def questions(texts: Sequence[str], most: int) -> list[dict[str, Any]]:
    """Texts split in the middle, each with its own ending and three of others in random order."""
    chance = random.Random(0)
    beginnings = [words[:LONGEST] for text in texts if len(words := text.split()) >= SHORTEST]
    halves = [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in beginnings]
    made = []
    for beginning, ending in chance.sample(halves, min(most, len(halves))):
        others = chance.sample([other for _, other in halves if other != ending], ENDINGS - 1)
        endings = chance.sample([ending, *others], ENDINGS)
        made.append({"beginning": beginning, "endings": endings, "right": endings.index(ending)})
    return made


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {file}")


if __name__ == "__main__":
    run_command(main, one_process=True)
