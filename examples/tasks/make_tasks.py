"""Write the task files beside this one from the documentation of the Python that runs it.

`python examples/tasks/make_tasks.py` needs no data. `docstrings.jsonl`: which of four endings belongs to the beginning of a
docstring of the standard library. `language_reference.jsonl`: the same for paragraphs of Python's language reference. Both are
for `validation.tasks` (docs/validation.md) and were made by Python 3.11. The same Python gives the same files.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import argparse
from collections.abc import Iterable, Iterator, Sequence

from examples.common import interpreter_topics, standard_docstrings
from examples.lm_eval.make_task import questions, write
from launch.common import run_command, whole_number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR", help="folder of the files")
    parser.add_argument("--questions", type=whole_number(1), default=64, metavar="N", help="largest number in each file")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    docstrings = [text for _, text in standard_docstrings()]
    write(arguments.output / "docstrings.jsonl", task(plain(docstrings), arguments.questions))
    reference = list(dict.fromkeys(paragraphs(interpreter_topics())))
    write(arguments.output / "language_reference.jsonl", task(plain(reference), arguments.questions))


def task(texts: Sequence[str], most: int) -> Iterable[dict[str, object]]:
    """Questions in the form of `validation.tasks`; a choice begins with the space after its context."""
    for made in questions(texts, most):
        choices = [f" {ending}" for ending in made["endings"]]
        yield {"context": made["beginning"], "choices": choices, "answer": made["right"]}


def plain(texts: Iterable[str]) -> list[str]:
    """Those that begin like a sentence and are ASCII, so that any tokenizer has short tokens for them."""
    return [text for text in texts if text.isascii() and text[:1].isupper()]


def paragraphs(pages: Iterable[str]) -> Iterator[str]:
    """The paragraphs of prose: those that end like a sentence and hold no table, code or grammar."""
    for page in pages:
        for paragraph in page.split("\n\n"):
            text = " ".join(paragraph.split())
            if text.endswith(".") and not any(mark in text for mark in ("|", ">>>", "::=", "-----", "*****")):
                yield text


if __name__ == "__main__":
    run_command(main, one_process=True)
