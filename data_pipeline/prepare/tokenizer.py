"""A byte-level BPE: trained and stored by `tokenizers`, run by `tiktoken` if both give the same ids.

Byte-level means that every text can be encoded and comes back unchanged, and that each id stands for known bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from configs.errors import UserError
from data_pipeline.corrupt.vocabulary import is_byte_level
from data_pipeline.prepare.fast_encoding import BYTE_OF_SYMBOL, fast_encoding
from data_pipeline.prepare.special_tokens import with_special_tokens
from data_pipeline.prepare.token_writer import smallest_dtype
from data_pipeline.prepare.tokenizer_files import check_conversion, tokenizer_text
from data_pipeline.read.token_bytes import token_bytes

END_OF_DOCUMENT = "<|endoftext|>"
END_OF_DOCUMENT_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|end▁of▁sentence|>",
    "[EOS]",
    "<EOS>",
    "<|im_end|>",
)
SMALLEST_VOCABULARY = 257  # all bytes and the end of a document
# A tokenizer must decode these texts back unchanged. tiktoken is used only if its ids for them equal those of tokenizers.
PROBES = (
    "The quick brown fox, it's 1234 o'clock; we'll see: they've gone.\n\n\tdef f(x):\n        return x ** 2  # two  ",
    f"{END_OF_DOCUMENT} is ordinary text here",
    "naïve café Ωmega ﬁ ½ ٣ 東京 🙂👩‍👩‍👧 e\u0301\u00a0\u2003\u3000x\r\n\x00\x7f\ufeff",
    "IT'S DON'T we'LL 'Re x'\u017f y'\u212a ''s \u0130stanbul HelloWorld fooBAR ǅemal 12345 1\r\n\r\n  /\n\t\t x /**/ -- ...\n",
)


def train(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> str:
    """Train a byte-level BPE with at most `vocab_size` ids, fewer if the text has too few words; returns its JSON.

    Same texts, same JSON. Id 0 is END_OF_DOCUMENT; `special_tokens` are the last ids. UserError if `vocab_size` has no room
    for these and all bytes.
    """
    smallest = SMALLEST_VOCABULARY + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(f"--vocab-size {vocab_size}: at least {smallest} (256 bytes, {END_OF_DOCUMENT} and --special-tokens)")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return with_special_tokens(inner.to_str(pretty=True), special_tokens, "the tokenizer")


class Tokenizer:
    """Text ↔ ids. `load` one from a file; `text` is the file's content."""

    def __init__(self, text: str, origin: str, fast: bool | None = None) -> None:
        """`origin` names the file in errors. `fast`: whether tiktoken encodes, if that is already known.

        UserError unless it is a tokenizers JSON: lossless, with an end-of-document token.
        """
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
            self._json: dict[str, Any] = json.loads(self._inner.to_str())
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{origin}: is not a tokenizer file of the tokenizers library: {error}") from error
        _check_all_bytes(self._json, origin)
        self.text = text
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = self._find_end_of_document(origin)
        # A special token's name inside a document is ordinary text.
        self._inner.encode_special_tokens = True
        self._divide_names()
        # Padding and truncation of the file would change documents.
        self._inner.no_padding()
        self._inner.no_truncation()
        self._check_round_trip(origin)
        self._use_fast = fast

    @classmethod
    def load(cls, path: str | Path, pattern: str | None = None, special_tokens: Sequence[str] = ()) -> Tokenizer:
        """Read a file or folder, see `tokenizer_text`, and add `special_tokens`; UserError when it cannot be read or used."""
        tokenizer = cls(with_special_tokens(tokenizer_text(Path(path), pattern), special_tokens, str(path)), str(path))
        check_conversion(Path(path), tokenizer.encode, PROBES)
        return tokenizer

    @property
    def dtype(self) -> str:
        """The type of ids in token files."""
        return smallest_dtype(self.vocab_size)

    @cached_property
    def _fast(self) -> tiktoken.Encoding | None:
        """tiktoken, if it gives the same ids."""
        if self._use_fast is False:
            return None
        encoding = fast_encoding(self._json, proven=self._use_fast is True)
        return encoding if encoding is not None and self._agrees(encoding, PROBES) else None

    def agrees_on(self, texts: Iterable[str]) -> bool:
        """True if tiktoken, where it is used, gives the ids of tokenizers for `texts`."""
        return self._fast is None or self._agrees(self._fast, texts)

    def _agrees(self, encoding: tiktoken.Encoding, texts: Iterable[str]) -> bool:
        try:
            return all(encoding.encode_ordinary(text) == self._ids(text) for text in texts)
        except ValueError:
            return False

    def _ids(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

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
        return np.array(self._ids(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes of text each id stands for; 0 for special tokens and unused ids."""
        return token_bytes(self._json)

    def _divide_names(self) -> None:
        """A Unigram model takes any token's name in a text for it: lay those of special ones and bytes across two words."""
        if self._json["model"]["type"] != "Unigram":
            return
        names = [token["content"] for token in self._json["added_tokens"] if token["special"]]
        named = [rf"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names]
        divide = pre_tokenizers.Split(Regex("|".join([*named, "<(?=0x[0-9A-F]{2}>)"])), "isolated")
        own = self._inner.pre_tokenizer
        self._inner.pre_tokenizer = divide if own is None else pre_tokenizers.Sequence([own, divide])

    def _check_round_trip(self, origin: str) -> None:
        """UserError unless PROBES decode back unchanged, except for what the file's own normaliser changes.

        Tokens that were added to a vocabulary may take spaces beside them away, so each is tried between some.
        """
        normalizer, decoder = self._inner.normalizer, self._inner.decoder
        spaces = not is_byte_level(self._json["decoder"])  # its normaliser writes them as U+2581, its decoder takes that back
        added = [token["content"] for token in self._json["added_tokens"] if not token["special"]]
        for probe in [*PROBES, *(f"a  {content}  b{content}c\n{content}\td" for content in added)]:
            expected = probe if normalizer is None else normalizer.normalize_str(probe)
            if normalizer is not None and decoder is not None and spaces:
                expected = decoder.decode([expected])
            found = self.decode(self._ids(probe))
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


def _check_all_bytes(tree: dict[str, Any], origin: str) -> None:
    """UserError unless the vocabulary has all 256 bytes: as GPT-2 writes them, or as SentencePiece's byte fallback does."""
    model = tree["model"]
    if is_byte_level(tree["pre_tokenizer"]) and is_byte_level(tree["decoder"]) and model.get("type") == "BPE":
        names = BYTE_OF_SYMBOL
    elif model.get("byte_fallback"):
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    else:
        raise UserError(
            f"{origin}: must be a byte-level BPE (GPT-2, Llama 3, Qwen, OLMo …), with ByteLevel as pre_tokenizer and decoder, "
            "or fall back to bytes (Llama 2, Mistral, Gemma …), so that no text is lost"
        )
    known = model["vocab"] if isinstance(model["vocab"], dict) else {name for name, _ in model["vocab"]}
    missing = [name for name in names if name not in known]
    if missing:
        examples = ", ".join(f"{name!r} (0x{names[name]:02x})" for name in missing[:3])
        raise UserError(f"{origin}: {len(missing)} of the 256 bytes are not in the vocabulary, so text is lost: {examples}")
