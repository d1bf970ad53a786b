"""tiktoken in the place of tokenizers, several times faster, where both provably give the same ids.

Both split a text into words by a pattern and merge the bytes of each word. tiktoken merges two neighbours if together they
are in the vocabulary, the lowest id first; tokenizers only if its list of merges has the pair, in the order of that list. Let
the list be in the order of the ids that it makes. Then the two can differ only at a pair that makes an id T without being one
of T's merges. When tiktoken comes to T, no pair with a lower id is left, and no token reaches across the ends of T's bytes.
So these bytes are in the state in which merging them alone, by lower ids, ends: if that state is one of T's merges, for every
T, the two never differ.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import tiktoken

# How GPT-2 splits text into words; `tokenizers` builds it into its ByteLevel.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CL100K_PATTERN = LLAMA3_PATTERN.replace(r"|\s*[\r\n]+", r"|\s+\z|\s*[\r\n]+")  # of GPT-4: space at the end is one word
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = "|".join(  # of GPT-4o and gpt-oss
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "cl100k": CL100K_PATTERN,
    "llama3": LLAMA3_PATTERN,
    "qwen": QWEN_PATTERN,
    "o200k": O200K_PATTERN,
}


def symbol_bytes() -> dict[str, int]:
    """GPT-2 writes bytes as printable characters: printable bytes as themselves, the others as U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_SYMBOL = symbol_bytes()


def fast_encoding(tree: dict[str, Any], proven: bool = False) -> tiktoken.Encoding | None:
    """tiktoken with the vocabulary of a tokenizer's JSON; None unless it gives the same ids.

    `proven`: another process has found that it does.
    """
    pattern = _pattern(tree)
    if pattern is None or not _is_plain(tree):
        return None
    special = {added["content"]: added["id"] for added in tree["added_tokens"]}
    vocabulary = {name: number for name, number in tree["model"]["vocab"].items() if name not in special}
    try:
        ranks = {bytes(BYTE_OF_SYMBOL[symbol] for symbol in name): number for name, number in vocabulary.items()}
        if not proven:
            merges = [(_as_bytes(left), _as_bytes(right)) for left, right in tree["model"]["merges"]]
            if not same_merges(ranks, merges, bool(tree["model"].get("ignore_merges"))):
                return None
    except KeyError:
        return None
    try:
        return tiktoken.Encoding("manyheads", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except ValueError:
        return None


def same_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], words_first: bool) -> bool:
    """True if merging by `merges` and merging by the ids of what comes out always give the same; see the proof above.

    tiktoken looks complete words up first; tokenizers does only with `words_first`. That matters for tokens that merging never
    makes.
    """
    made = [ranks.get(left + right, -1) for left, right in merges]
    if -1 in made or made != sorted(made):
        return False
    pairs: dict[bytes, set[tuple[bytes, bytes]]] = {}
    for left, right in merges:
        pairs.setdefault(left + right, set()).add((left, right))
    for token in ranks:
        parts = last_pair(token, ranks)
        if (parts not in pairs.get(token, ())) if len(parts) == 2 else (len(parts) > 2 and not words_first):
            return False
    return True


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """What is left of the bytes of `token`, merged alone by ids lower than its own: two parts, if it can be made at all."""
    limit = ranks[token]
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 1:
        candidates = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(candidates)
        if lowest >= limit:
            break
        at = candidates.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def _as_bytes(symbols: str) -> bytes:
    return bytes(BYTE_OF_SYMBOL[symbol] for symbol in symbols)


def _pattern(tree: dict[str, Any]) -> str | None:
    """The pattern that splits words, if it is one that both libraries are known to understand alike."""
    pre = tree["pre_tokenizer"]
    if pre is None:
        return None
    parts = pre.get("pretokenizers", [pre])
    last = parts[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(parts) == 1:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    if len(parts) != 2 or last.get("use_regex", True) or parts[0]["type"] != "Split":
        return None
    split = parts[0]
    pattern = split["pattern"].get("Regex")
    known = pattern in PATTERNS.values() and split["behavior"] == "Isolated" and not split["invert"]
    return pattern if known else None


def _is_plain(tree: dict[str, Any]) -> bool:
    """True if nothing changes the text before or after it is split into words and merged."""
    model = tree["model"]
    odd = [model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")]
    return tree["normalizer"] is None and not any(odd) and all(added["special"] for added in tree["added_tokens"])
