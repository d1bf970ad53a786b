"""A byte-level BPE: trained and stored by `tokenizers`, run by `tiktoken` if both give the same ids.

Byte-level means that every text can be encoded and comes back unchanged, and that each id stands for known bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from configs.errors import UserError
from data_pipeline.read.token_bytes import token_bytes

END_OF_DOCUMENT = "<|endoftext|>"
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
SMALLEST_VOCABULARY = 257  # all bytes and the end of a document
# How GPT-2 splits text into words; `tokenizers` builds it into its ByteLevel.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# A tokenizer must decode these texts back unchanged. tiktoken is used only if its ids for them equal those of tokenizers.
PROBES = (
    "The quick brown fox, it's 1234 o'clock; we'll see: they've gone.\n\n\tdef f(x):\n        return x ** 2  # two  ",
    f"{END_OF_DOCUMENT} is ordinary text here",
    "naïve café Ωmega ﬁ ½ ٣ 東京 🙂👩‍👩‍👧 e\u0301\u00a0\u2003\u3000x\r\n\x00\x7f\ufeff",
)


def train(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE with at most `vocab_size` ids, fewer if the text has too few words; returns its JSON.

    Same texts, same JSON. Id 0 is END_OF_DOCUMENT. UserError if `vocab_size` has no room for all bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size}: at least {SMALLEST_VOCABULARY} (256 bytes and {END_OF_DOCUMENT})")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner.to_str(pretty=True)


class Tokenizer:
    """Text ↔ ids. `load` one from a file; `text` is the file's content."""

    def __init__(self, text: str, origin: str) -> None:
        """`origin` names the file in errors.

        UserError unless it is a tokenizers JSON: byte-level BPE, lossless, with an end-of-document token.
        """
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
            self._json: dict[str, Any] = json.loads(self._inner.to_str())
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{origin}: is not a tokenizer file of the tokenizers library: {error}") from error
        _check_byte_level(self._json, origin)
        self.text = text
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = self._find_end_of_document(origin)
        # A special token's name inside a document is ordinary text.
        self._inner.encode_special_tokens = True
        # Padding and truncation of the file would change documents.
        self._inner.no_padding()
        self._inner.no_truncation()
        self._check_round_trip(origin)
        self._fast = self._fast_encoding()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json; UserError when it cannot be read or used."""
        try:
            if Path(path).exists() and not Path(path).is_file():
                raise UserError(f"{path}: is no regular file")  # reading a device may never end
            return cls(Path(path).read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not a tokenizer file of the tokenizers library: not UTF-8") from error

    @property
    def engine(self) -> str:
        """The library that encodes: "tiktoken" or "tokenizers"."""
        return "tokenizers" if self._fast is None else "tiktoken"

    @property
    def sha256(self) -> str:
        """Of the file's content."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, see encode_array."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 [tokens], without an end of document. Releases the interpreter lock while it works.

        UserError if the text has surrogates, which is how Python passes on command-line bytes that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode: character {error.start + 1} is {text[error.start]!a}") from error
        if self._fast is not None:
            try:
                return self._fast.encode_to_numpy(text, disallowed_special=())
            except ValueError:
                pass  # its regular expressions fail on very long runs of spaces; those of tokenizers do not
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes of text each id stands for; 0 for special tokens and unused ids."""
        return token_bytes(self._json)

    def _check_round_trip(self, origin: str) -> None:
        """UserError unless PROBES decode back unchanged, except for what the file's own normaliser changes."""
        normalizer = self._inner.normalizer
        for probe in PROBES:
            expected = probe if normalizer is None else normalizer.normalize_str(probe)
            found = self.decode(self._inner.encode(probe, add_special_tokens=False).ids)
            if found not in (probe, expected):
                at = next(n for n in range(len(expected) + 1) if expected[: n + 1] != found[: n + 1])
                parts = f"{expected[at : at + 20]!r} comes back as {found[at : at + 20]!r}"
                raise UserError(f"{origin}: does not give text back unchanged: {parts}")

    def _find_end_of_document(self, origin: str) -> int:
        for name in END_OF_DOCUMENT_NAMES:
            identifier = self._inner.token_to_id(name)
            if identifier is not None:
                return identifier
        raise UserError(f"{origin}: has no token for the end of a document; known names: {', '.join(END_OF_DOCUMENT_NAMES)}")

    def _fast_encoding(self) -> tiktoken.Encoding | None:
        """tiktoken with the same merges; None unless the tokenizer is of GPT-2's kind and both give the same ids for PROBES."""
        if not self._is_gpt2_kind:
            return None
        special = {added["content"]: added["id"] for added in self._json["added_tokens"]}
        vocabulary = {name: number for name, number in self._json["model"]["vocab"].items() if name not in special}
        merged = [vocabulary.get(left + right, -1) for left, right in self._json["model"]["merges"]]
        if merged != sorted(merged) or len(set(merged)) + 256 != len(vocabulary):
            return None
        try:
            # Merged tokens have ids in the order of their merges, so ids serve as tiktoken's ranks.
            ranks = {bytes(_BYTE_OF_SYMBOL[symbol] for symbol in name): number for name, number in vocabulary.items()}
            fast = tiktoken.Encoding("manyheads", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
            same = all(
                fast.encode_ordinary(probe) == self._inner.encode(probe, add_special_tokens=False).ids for probe in PROBES
            )
        except (KeyError, ValueError):
            return None
        return fast if same else None

    @cached_property
    def _is_gpt2_kind(self) -> bool:
        model, pre = self._json["model"], self._json["pre_tokenizer"]
        return (
            pre["type"] == "ByteLevel"
            and not pre["add_prefix_space"]
            and pre.get("use_regex", True)
            and self._json["normalizer"] is None
            and not model.get("dropout")
            and not model.get("ignore_merges")
            and all(added["special"] for added in self._json["added_tokens"])
        )


def _check_byte_level(tree: dict[str, Any], origin: str) -> None:
    """UserError unless the tokenizer works on byte symbols, decodes them back, and has all bytes in its vocabulary."""
    model = tree["model"]
    if model.get("type") != "BPE" or not _is_byte_level(tree["pre_tokenizer"]) or not _is_byte_level(tree["decoder"]):
        raise UserError(
            f"{origin}: must be a byte-level BPE (GPT-2, Llama 3, Qwen, OLMo …), with ByteLevel as pre_tokenizer and decoder, "
            "so that no text is lost"
        )
    missing = [symbol for symbol in _BYTE_OF_SYMBOL if symbol not in model["vocab"]]
    if missing:
        examples = ", ".join(f"{symbol!r} (0x{_BYTE_OF_SYMBOL[symbol]:02x})" for symbol in missing[:3])
        raise UserError(f"{origin}: {len(missing)} of the 256 bytes are not in the vocabulary, so text is lost: {examples}")


def _is_byte_level(part: dict[str, Any] | None) -> bool:
    """True if a pre_tokenizer or decoder of the JSON is ByteLevel, or a sequence with one."""
    if part is None:
        return False
    inside = [*part.get("pretokenizers", ()), *part.get("decoders", ())]
    return part["type"] == "ByteLevel" or any(map(_is_byte_level, inside))


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2 writes bytes as printable characters: printable bytes as themselves, the others as U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _byte_of_symbol()
