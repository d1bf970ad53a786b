"""Special tokens, ordinary ids and words of a byte-level BPE, against the tokenizer itself."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from configs.errors import UserError
from data_pipeline.corrupt.vocabulary import Vocabulary
from data_pipeline.prepare.tokenizer import train

TEXT = "The cat's mat, 12 hats\n\tand a\nhome  run. naïve 東京 "


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(train([TEXT * 20], 330))
    made.add_special_tokens(["<|mask|>"])
    made.add_tokens(["plain added"])
    return made


@pytest.fixture(scope="module")
def vocabulary(tokenizer: tokenizers.Tokenizer) -> Vocabulary:
    return Vocabulary.of(json.loads(tokenizer.to_str()))


def test_special_and_ordinary_ids(tokenizer: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    mask, end = tokenizer.token_to_id("<|mask|>"), tokenizer.token_to_id("<|endoftext|>")
    assert vocabulary.special == {"<|mask|>": mask, "<|endoftext|>": end}
    assert vocabulary.ordinary.tolist() == sorted(set(tokenizer.get_vocab().values()) - {mask, end})


def test_ids_that_no_token_has_are_not_ordinary(tokenizer: tokenizers.Tokenizer) -> None:
    tree = json.loads(tokenizer.to_str())
    for token in tree["added_tokens"]:
        if token["content"] == "<|mask|>":
            token["id"] += 10
    vocabulary = Vocabulary.of(tree)
    assert len(vocabulary.is_special) == vocabulary.special["<|mask|>"] + 1
    assert vocabulary.is_special[tokenizer.token_to_id("<|mask|>")]


def test_words_are_what_white_space_separates(tokenizer: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    encoding = tokenizer.encode(TEXT)
    begins = vocabulary.word_begins(np.array(encoding.ids))
    places = [begin for (begin, _), begins_word in zip(encoding.offsets, begins, strict=True) if begins_word]
    parts = [TEXT[begin:end].split() for begin, end in pairwise([*places, len(TEXT)])]
    assert [word for part in parts for word in part] == TEXT.split()
    assert all(len(part) <= 1 for part in parts)
    assert len(begins) > len(parts), "all words have one token"


@pytest.mark.parametrize("as_list", [False, True])
def test_names_of_sentencepiece(as_list: bool) -> None:
    names = ["</s>", "<0x0A>", "<0x41>", "\u2581the", "he", "\u2581"]
    model = {
        "byte_fallback": True,
        "vocab": [[name, -1.0] for name in names] if as_list else {name: n for n, name in enumerate(names)},
    }
    vocabulary = Vocabulary.of({"model": model, "added_tokens": [{"id": 0, "content": "</s>", "special": True}]})
    assert vocabulary.ordinary.tolist() == [1, 2, 3, 4, 5]
    begins = vocabulary.word_begins(np.array([4, 4, 3, 4, 1, 4, 2, 5, 4]))
    assert begins.tolist() == [True, False, True, False, True, True, False, True, True]


def test_letters_that_stand_for_spaces_elsewhere() -> None:
    """Czech počítač, in a SentencePiece vocabulary whose name for a newline is the newline, as Gemma's."""
    names = ["\u2581po", "č", "ítač", "\n", "\u2581Ġ", "x"]
    model = {"byte_fallback": True, "vocab": {name: number for number, name in enumerate(names)}}
    vocabulary = Vocabulary.of({"model": model, "added_tokens": [{"id": 6, "content": "y\n", "special": False}]})
    begins = vocabulary.word_begins(np.array([0, 1, 2, 5, 3, 1, 4, 5, 6, 5]))
    assert begins.tolist() == [True, False, False, False, True, True, True, False, False, True]


def test_tokens_beside_special_ones_begin_words(tokenizer: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    a, mask = tokenizer.encode("a").ids[0], vocabulary.special["<|mask|>"]
    assert vocabulary.word_begins(np.array([a, a, mask, a, a])).tolist() == [True, False, True, True, False]


def test_what_is_missing_is_said(vocabulary: Vocabulary) -> None:
    assert vocabulary.missing(["<|mask|>"]) is None
    why = vocabulary.missing([f"<|sentinel_{number}|>" for number in range(3)] + ["<|mask|>"])
    assert why is not None
    assert "no special token <|sentinel_0|> to <|sentinel_2|> (3 of 4); prepare the data with --special-tokens" in why
    assert "no special token plain added; prepare the data" in str(vocabulary.missing(["plain added"])), "text can have it"


@pytest.mark.parametrize("content", ["{}", "[1", '{"added_tokens": 3, "model": {}}'])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        Vocabulary.read(tmp_path / "tokenizer.json")
