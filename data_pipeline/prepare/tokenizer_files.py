"""The files that hold tokenizers, each as the JSON of the tokenizers library: its own, folders of transformers, tiktoken's,
SentencePiece's.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from configs.errors import UserError
from data_pipeline.prepare.fast_encoding import BYTE_OF_SYMBOL, GPT2_PATTERN, PATTERNS, last_pair
from data_pipeline.prepare.sentencepiece_model import check_ids, from_sentencepiece, is_model

FILE = "tokenizer.json"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n?")


@dataclass(frozen=True)
class Published:
    """What a tiktoken file does not say, of one that is widely used."""

    name: str
    pattern: str  # key of PATTERNS
    end_of_document: tuple[str, int]


BY_RANKS = {  # the number of ids in the file tells them apart
    50256: Published("r50k_base", "gpt2", ("<|endoftext|>", 50256)),
    50280: Published("p50k_base", "gpt2", ("<|endoftext|>", 50256)),
    100256: Published("cl100k_base", "cl100k", ("<|endoftext|>", 100257)),
    128000: Published("Llama 3", "llama3", ("<|end_of_text|>", 128001)),
    151643: Published("Qwen", "qwen", ("<|endoftext|>", 151643)),
    199998: Published("o200k_base", "o200k", ("<|endoftext|>", 199999)),
}


def tokenizer_text(path: Path, pattern: str | None = None) -> str:
    """The JSON of the tokenizer at `path`. `pattern`: how a tiktoken file splits words, a key of PATTERNS.

    UserError when it cannot be read, or is of a kind that is not known.
    """
    path, content = _content(path)
    if _TIKTOKEN_LINE.match(content):
        return from_tiktoken(content, str(path), pattern)
    if pattern is not None:
        raise UserError(f"{path}: is no tiktoken file, so leave --tiktoken-pattern out")
    if is_model(content):
        return from_sentencepiece(content, str(path))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not a tokenizer file of the tokenizers library: not UTF-8") from error


def check_conversion(path: Path, encode: Callable[[str], list[int]], samples: Iterable[str]) -> None:
    """UserError if the tokenizer at `path` is a SentencePiece model that gives `samples` other ids than what was made of it."""
    path, content = _content(path)
    if is_model(content):
        check_ids(content, encode, str(path), samples)


def _content(path: Path) -> tuple[Path, bytes]:
    """The file, in a folder the one that is a tokenizer, and what it holds."""
    try:
        if path.is_dir():
            path = _in_folder(path)
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file")  # reading a device may never end
        return path, path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _in_folder(folder: Path) -> Path:
    if (folder / FILE).is_file():
        return folder / FILE
    found = sorted([*folder.glob("*.tiktoken"), *folder.glob("*.model")])
    if len(found) == 1:
        return found[0]
    raise UserError(f"{folder}: holds no {FILE}; name a folder that save_pretrained of transformers has written, or a file")


def from_tiktoken(content: bytes, origin: str, pattern: str | None) -> str:
    """The JSON of a tokenizer with the ids of tiktoken, from a file with a line of base64 and id for each token."""
    ranks = _ranks(content, origin)
    known = BY_RANKS.get(len(ranks))
    if pattern is None and known is None:
        names = ", ".join(f"{published.name} ({count:,})" for count, published in BY_RANKS.items())
        raise UserError(
            f"{origin}: has {len(ranks):,} ids, so it is none of {names}; say with --tiktoken-pattern how it splits words"
        )
    if pattern is None:
        assert known is not None
        pattern, (name, identifier) = known.pattern, known.end_of_document
    else:
        name, identifier = "<|endoftext|>", max(ranks.values()) + 1
    symbols = {byte: symbol for symbol, byte in BYTE_OF_SYMBOL.items()}

    def written(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = last_pair(token, ranks) if len(token) > 1 else ()
        if len(parts) == 2:  # one that cannot be made by merging is only found as a complete word
            merges.append((written(parts[0]), written(parts[1])))
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary | {name: identifier}, merges, ignore_merges=True))
    if PATTERNS[pattern] == GPT2_PATTERN:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
        symbols_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([words, symbols_of_words])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return inner.to_str()


def _ranks(content: bytes, origin: str) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{origin}:{number}: is not a token in base64 and its id") from error
    if len(set(ranks.values())) != len(ranks) or b"" in ranks:
        raise UserError(f"{origin}: gives one id to several tokens, or has an empty one")
    return ranks
