"""How many bytes of text each token id stands for, so that losses of different tokenizers can be compared."""

from __future__ import annotations

from typing import Any

import numpy as np


def token_bytes(tokenizer: dict[str, Any]) -> np.ndarray:
    """int64 [vocab_size]: UTF-8 bytes of text that each id stands for; 0 for special tokens and unused ids.

    `tokenizer` is the JSON of a byte-level BPE, as a prepared folder has it.
    """
    vocabulary, added_tokens = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    counts = np.zeros(max(*vocabulary.values(), *(added["id"] for added in added_tokens)) + 1, dtype=np.int64)
    for symbols, identifier in vocabulary.items():
        counts[identifier] = len(symbols)  # byte-level: one symbol for each byte
    for added in added_tokens:
        counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return counts
