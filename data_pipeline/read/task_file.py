"""Multiple-choice tasks: their files, and their tokens as lm-evaluation-harness makes them. Torch-free.

Each line of a file is an object with `context`, `choices` and `answer`, the index of the right choice from 0; other keys are
passed over. A choice follows its context as it stands, so one of the two has the space between them.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from configs.errors import UserError
from configs.schema import DataConfig, Fault, Section, ValidationConfig

MOST_FAULTS = 3  # of one file that are listed
WITHOUT_CONTEXT = (
    "has no context, but data.packing keeps documents apart, so that the model does not learn how a text begins; give it one, "
    "or leave it out"
)


@dataclass(frozen=True)
class Item:
    """One question: the text before each of its choices, and which of them is right."""

    line: int  # of the file, from 1
    context: str
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class Row:
    """The tokens of a context and one of its choices; the last `scored` of them are the choice's."""

    tokens: list[int]
    scored: int


@dataclass(frozen=True)
class Task:
    """A task as a run scores it: the rows of all choices in order, item after item."""

    name: str
    items: list[Item]
    rows: list[Row]
    cut: int  # items of which a row lost its beginning


class Encoder(Protocol):
    """What is needed of a Tokenizer."""

    end_of_document: int

    def encode(self, text: str) -> list[int]: ...


def task_faults(sections: Mapping[str, Section]) -> Iterator[Fault]:
    """Faults of the files in `validation.tasks`: the first few lines that cannot be used, and how many more there are."""
    validation, data = sections.get("validation"), sections.get("data")
    apart = isinstance(data, DataConfig) and data.keeps_documents_apart
    if isinstance(validation, ValidationConfig):
        for name, path in validation.tasks.items():
            items, reasons = _read(Path(path))
            if apart:
                reasons += [f"line {item.line}: {WITHOUT_CONTEXT}" for item in items if not item.context.strip()]
            more = len(reasons) - MOST_FAULTS
            shown = [*reasons[:MOST_FAULTS], *([f"and {more:,} more lines cannot be used"] if more > 0 else [])]
            yield from (Fault(f"validation.tasks.{name}", path, reason) for reason in shown)


def read_items(path: Path) -> list[Item]:
    """The items of a task's file. UserError, with the line, for a file that cannot be used."""
    items, reasons = _read(path)
    if reasons:
        raise UserError(f"{path}: {reasons[0]}")
    return items


def encode_task(name: str, path: Path, encoder: Encoder, length: int) -> Task:
    """The task of this file for a model that reads `length` tokens. UserError for a choice that it cannot score."""
    items, rows, cut = read_items(path), list[Row](), 0
    for item in items:
        longest = 0
        for number, choice in enumerate(item.choices):
            before, scored = encode_pair(encoder, item.context, choice)
            if not 0 < len(scored) <= length:
                how = "has no token of its own: separate it by a space" if not scored else f"has {len(scored)} tokens"
                limit = f"; at most data.sequence_length ({length})" if scored else ""
                raise UserError(f"{path}: line {item.line}: choice {number} {how}{limit}")
            tokens = before + scored
            longest = max(longest, len(tokens))
            rows.append(Row(tokens[-(length + 1) :], len(scored)))
        cut += longest > length + 1
    return Task(name, items, rows, cut)


def encode_pair(encoder: Encoder, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of a context, and those of a choice after it, as lm-evaluation-harness divides them.

    Spaces at the end of the context go to the choice, with which they make a token. The context is encoded alone, and context
    and choice as one text; what goes beyond the number of the context's tokens there is the choice's. So where a word goes on
    from one to the other, the two need not be the text's own tokens. Without a context the choice follows an end of document.
    """
    kept = context.rstrip()
    choice = context[len(kept) :] + choice
    if not kept:
        return [encoder.end_of_document], encoder.encode(choice)
    before = encoder.encode(kept)
    return before, encoder.encode(kept + choice)[len(before) :]


def _read(path: Path) -> tuple[list[Item], list[str]]:
    """What a file holds, and why lines of it, or all of it, cannot be used."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except FileNotFoundError:
        return [], ["no such file"]
    except OSError as error:
        return [], [f"cannot be read: {error.strerror}"]
    items, reasons = list[Item](), list[str]()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found = _item(number, line)
            if isinstance(found, Item):
                items.append(found)
            else:
                reasons.append(f"line {number}: {found}")
    return items, reasons if items or reasons else ["is empty; it needs a line for each question"]


def _item(number: int, line: bytes) -> Item | str:
    """The item of a line, or why it is none."""
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON: {error}"
    if not isinstance(entry, dict):
        return 'must be an object such as {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}'
    context, choices, answer = (entry.get(key) for key in ("context", "choices", "answer"))
    if not _is_text(context):
        return _wrong(entry, "context", "text, which may be empty")
    if not isinstance(choices, list) or len(choices) < 2 or not all(_is_text(choice) and choice for choice in choices):
        return _wrong(entry, "choices", "a list of at least two texts, none of them empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        return _wrong(entry, "answer", f"the index of the right choice, from 0 to {len(choices) - 1}")
    assert isinstance(context, str)
    return Item(number, context, choices, answer)


def _is_text(value: Any) -> bool:
    """True for text that can be encoded: JSON can have halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _wrong(entry: dict[str, Any], key: str, wanted: str) -> str:
    if key not in entry:
        return f"has no {key}; it must be {wanted}"
    shown = json.dumps(entry[key])
    return f"{key} is {shown if len(shown) <= 60 else shown[:57] + '…'}; it must be {wanted}"
