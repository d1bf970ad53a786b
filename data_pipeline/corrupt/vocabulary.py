"""What corruption reads in a tokenizer.json: special tokens by their text, ordinary ids, and where words begin. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError

TOKENIZER = "tokenizer.json"

# How names of tokens write space, newline, tab and return. What byte-level ones write are letters to SentencePiece: č, Ġ.
PLAIN = (" ", "\n", "\t", "\r")
BYTE_LEVEL = ("\u0120", "\u010a", "\u0109", "\u010d")
SENTENCEPIECE = ("\u2581", "<0x20>", "<0x0A>", "<0x09>", "<0x0D>", *PLAIN)


def token_ids(model: dict[str, Any]) -> dict[str, int]:
    """Ids by name; a Unigram model lists names with their scores in the order of ids."""
    vocabulary = model["vocab"]
    return vocabulary if isinstance(vocabulary, dict) else {name: number for number, (name, _) in enumerate(vocabulary)}


def is_byte_level(part: dict[str, Any] | None) -> bool:
    """True if a pre_tokenizer or decoder of the JSON is ByteLevel, or a sequence with one."""
    if part is None:
        return False
    inside = [*part.get("pretokenizers", ()), *part.get("decoders", ())]
    return part["type"] == "ByteLevel" or any(map(is_byte_level, inside))


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer that loses no text. Arrays are by id."""

    special: dict[str, int]
    is_special: np.ndarray  # bool [ids]; True for ids that no token has, too
    begins_with_space: np.ndarray  # bool [ids]
    ends_with_space: np.ndarray  # bool [ids]

    @classmethod
    def of(cls, tokenizer: dict[str, Any]) -> Vocabulary:
        """`tokenizer` is the JSON of a prepared folder's tokenizer."""
        added = tokenizer["added_tokens"]
        special = {token["content"]: token["id"] for token in added if token["special"]}
        texts = {number: text for text, number in token_ids(tokenizer["model"]).items()}
        plain = {token["id"]: token["content"] for token in added if not token["special"]}
        size = max(*texts, *plain, *special.values(), 0) + 1
        is_special, begins, ends = np.ones(size, bool), np.zeros(size, bool), np.zeros(size, bool)
        falls_back = tokenizer["model"].get("byte_fallback") and not is_byte_level(tokenizer.get("decoder"))
        spaces = SENTENCEPIECE if falls_back else BYTE_LEVEL
        for names, blanks in ((texts, spaces), (plain, PLAIN)):
            for number, text in names.items():
                is_special[number] = False
                begins[number], ends[number] = text.startswith(blanks), text.endswith(blanks)
        is_special[list(special.values())] = True
        return cls(special, is_special, begins, ends)

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """UserError if the file cannot be read."""
        try:
            return cls.of(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read as a tokenizer ({error})") from error

    def missing(self, names: list[str]) -> str | None:
        """What to do about special tokens that the tokenizer lacks; None if it has all these names."""
        lacks = [name for name in names if name not in self.special]
        if not lacks:
            return None
        these = lacks[0] if len(lacks) == 1 else f"{lacks[0]} to {lacks[-1]} ({len(lacks)} of {len(names)})"
        add = "prepare the data with --special-tokens (docs/objectives.md), or name one that it has"
        return f"its {TOKENIZER} has no special token {these}; {add}"

    @cached_property
    def ordinary(self) -> np.ndarray:
        """The ids of text, int64 ascending."""
        return np.flatnonzero(~self.is_special)

    def word_begins(self, tokens: np.ndarray) -> np.ndarray:
        """Which of `tokens` begin a word: after white space, at the beginning, or beside a special token; bool."""
        begins = self.begins_with_space[tokens] | self.is_special[tokens]
        begins[1:] |= self.ends_with_space[tokens[:-1]] | self.is_special[tokens[:-1]]
        begins[:1] = True
        return begins
