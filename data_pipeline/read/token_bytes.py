"""How many bytes of text each token id stands for, so that losses of different tokenizers can be compared."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import numpy as np

from data_pipeline.corrupt.vocabulary import is_byte_level, token_ids

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece's byte fallback writes a byte


def token_bytes(tokenizer: dict[str, Any]) -> np.ndarray:
    """int64 [vocab_size]: UTF-8 bytes of text that each id stands for; 0 for special tokens and unused ids.

    `tokenizer` is the JSON of a tokenizer that loses no text, as a prepared folder has it: byte-level, or with byte fallback.
    """
    vocabulary, added_tokens = token_ids(tokenizer["model"]), tokenizer["added_tokens"]
    largest = max(chain(vocabulary.values(), (added["id"] for added in added_tokens)))
    counts = np.zeros(largest + 1, dtype=np.int64)
    byte_level = is_byte_level(tokenizer.get("decoder")) or not tokenizer["model"].get("byte_fallback")
    for name, identifier in vocabulary.items():
        # Byte-level: one symbol for each byte. Else U+2581 stands for a space.
        counts[identifier] = len(name) if byte_level else 1 if _BYTE.fullmatch(name) else len(name.replace("▁", " ").encode())
    for added in added_tokens:
        counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return counts
