"""Ids, bytes and round trips; tiktoken and tokenizers must agree."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from configs.errors import UserError
from data_pipeline.tokenizer import END_OF_DOCUMENT, Tokenizer, train

TEXTS = [Path(random.__file__).read_text(encoding="utf-8"), Path(json.__file__).read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def trained() -> str:
    return train(TEXTS, 600)


@pytest.fixture(scope="module")
def tokenizer(trained: str) -> Tokenizer:
    return Tokenizer(trained, "tokenizer.json")


def changed(trained: str, **parts: object) -> str:
    return json.dumps(json.loads(trained) | parts)


def random_texts(count: int) -> list[str]:
    """Any characters, with stretches of one kind; no surrogates, which no UTF-8 has."""
    random_source = random.Random(7)
    kinds = [(32, 127), (0, 64), (0x370, 0x1F00), (0x3000, 0xD800), (0xE000, 0x110000)]
    return ["".join(chr(random_source.randrange(*random_source.choice(kinds))) for _ in range(40)) for _ in range(count)]


def test_trained_vocabulary(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.engine) == (600, 0, "tiktoken")
    assert tokenizer.decode([0]) == END_OF_DOCUMENT


def test_training_is_deterministic(trained: str) -> None:
    assert train(TEXTS, 600) == trained


def test_any_unicode_comes_back_with_the_ids_of_tokenizers(tokenizer: Tokenizer, trained: str) -> None:
    reference = tokenizers.Tokenizer.from_str(trained)
    token_bytes = tokenizer.token_bytes()
    for text in [*random_texts(200), *TEXTS, "", " \n "]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert token_bytes[ids].sum() == len(text.encode())
    assert token_bytes[0] == 0
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_a_special_name_in_a_document_is_ordinary_text(tokenizer: Tokenizer, trained: str) -> None:
    slow = Tokenizer(changed(trained, normalizer={"type": "NFC"}), "slow")
    assert slow.engine == "tokenizers"
    for kind in (tokenizer, slow):
        ids = kind.encode(f"a{END_OF_DOCUMENT}b")
        assert kind.end_of_document not in ids
        assert kind.decode(ids) == f"a{END_OF_DOCUMENT}b"


def test_runs_of_spaces_too_long_for_tiktoken(tokenizer: Tokenizer) -> None:
    text = " " * 1_000_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_out_of_order_are_not_given_to_tiktoken(trained: str) -> None:
    tree = json.loads(trained)
    tree["model"]["merges"].reverse()
    assert Tokenizer(json.dumps(tree), "other").engine == "tokenizers"


def test_padding_and_truncation_of_the_file_are_ignored(trained: str) -> None:
    inner = tokenizers.Tokenizer.from_str(trained)
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    loaded = Tokenizer(changed(inner.to_str(), normalizer={"type": "NFC"}), "cut")
    assert loaded.decode(loaded.encode("one two three four")) == "one two three four"


def test_end_of_document_of_other_names(trained: str) -> None:
    other = Tokenizer(trained.replace(END_OF_DOCUMENT, "</s>"), "other")
    assert other.end_of_document == 0
    with pytest.raises(UserError, match="no token for the end of a document"):
        Tokenizer(trained.replace(END_OF_DOCUMENT, "<unknown>"), "other")


def test_bad_files(tmp_path: Path, trained: str) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Tokenizer.load(tmp_path / "none.json")
    for content in (b"{}", b"no json", b"\xff", trained[:500].encode()):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.json: is not a tokenizer file"):
            Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(UserError, match="must be a byte-level BPE"):
        Tokenizer(changed(trained, pre_tokenizer={"type": "Whitespace"}), "words")
    with pytest.raises(UserError, match="at least 257"):
        train(TEXTS, 256)


def test_ids_are_small_integers(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_array("text").dtype == np.uint32
    assert all(isinstance(number, int) for number in tokenizer.encode("text"))
