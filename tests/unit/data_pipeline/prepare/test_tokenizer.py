"""Ids, bytes and round trips; tiktoken and tokenizers must agree."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from configs.errors import UserError
from data_pipeline.corrupt.vocabulary import Vocabulary
from data_pipeline.prepare.tokenizer import END_OF_DOCUMENT, Tokenizer, train

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


def byte_level_bpe(missing: str = "", add_prefix_space: bool = False) -> dict[str, Any]:
    """The JSON of a vocabulary of single bytes without the symbol `missing`."""
    symbols = [END_OF_DOCUMENT, *(symbol for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) if symbol != missing)]
    inner = tokenizers.Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    inner.decoder = decoders.ByteLevel()
    return json.loads(inner.to_str())


WORDS = byte_level_bpe()["pre_tokenizer"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (byte_level_bpe("Ġ"), r"1 of the 256 bytes are not in the vocabulary, so text is lost: 'Ġ' \(0x20\)"),
        (byte_level_bpe("ÿ"), r"'ÿ' \(0xff\)"),
        (byte_level_bpe() | {"decoder": None}, "ByteLevel as pre_tokenizer and decoder"),
        (byte_level_bpe() | {"decoder": {"type": "Fuse"}}, "ByteLevel as pre_tokenizer and decoder"),
        (
            byte_level_bpe(add_prefix_space=True),
            "does not give text back unchanged: 'The quick brown fox,' comes back as ' The",
        ),
        (
            byte_level_bpe() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, WORDS]}},
            "does not give text back unchanged: .* quick brown fox, .* comes back as .*quickbrownfox,",
        ),
    ],
)
def test_files_that_lose_text(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"lossy: .*{message}"):
        Tokenizer(json.dumps(tree), "lossy")


def test_sequences_and_normalizers_are_byte_level_too() -> None:
    tree = byte_level_bpe()
    cut = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, tree["pre_tokenizer"]]}
    decoder = {"type": "Sequence", "decoders": [tree["decoder"]]}
    parts = {"pre_tokenizer": cut, "decoder": decoder, "normalizer": {"type": "NFKC"}}
    loaded = Tokenizer(json.dumps(tree | parts), "llama")
    assert loaded.decode(loaded.encode("½ two")) == "1⁄2 two"


def test_text_with_surrogates(tokenizer: Tokenizer, trained: str) -> None:
    for kind in (tokenizer, Tokenizer(changed(trained, normalizer={"type": "NFC"}), "slow")):
        with pytest.raises(UserError, match=r"the text is not valid Unicode: character 3 is '\\udcff'"):
            kind.encode("ab\udcff")


def test_bad_files(tmp_path: Path, trained: str) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Tokenizer.load(tmp_path / "none.json")
    for content in (b"{}", b"no json", b"\xff", trained[:500].encode()):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.json: is not a tokenizer file"):
            Tokenizer.load(tmp_path / "bad.json")
    for path, message in (
        (tmp_path, "holds no tokenizer.json"),
        (Path("/dev/zero"), "is no regular"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(UserError, match=message):
            Tokenizer.load(path)
    with pytest.raises(UserError, match="must be a byte-level BPE"):
        Tokenizer(changed(trained, pre_tokenizer={"type": "Whitespace"}), "words")
    with pytest.raises(UserError, match="at least 257"):
        train(TEXTS, 256)


def test_the_smallest_vocabulary_is_all_bytes_and_the_end_of_a_document() -> None:
    assert Tokenizer(train(TEXTS, 257), "smallest").vocab_size == 257


def test_ids_are_small_integers(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_array("text").dtype == np.uint32
    assert all(isinstance(number, int) for number in tokenizer.encode("text"))


def byte_fallback(kind: str, pieces: tuple[str, ...] = ("▁", "t", "h", "e", "▁t", "he", "▁the")) -> dict[str, Any]:
    """A tokenizer as SentencePiece's models of Llama 2 become in transformers."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    if kind == "BPE":
        merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
        model: models.Model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    else:
        model = models.Unigram([(name, -float(number)) for number, name in enumerate(names)], 0, byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "</s>"])
    return json.loads(inner.to_str())


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_byte_fallback_loses_no_text_and_counts_its_bytes(kind: str) -> None:
    loaded = Tokenizer(json.dumps(byte_fallback(kind)), "fallback")
    assert (loaded.engine, loaded.end_of_document) == ("tokenizers", 1)
    for text in ["the the", *random_texts(50)]:
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert loaded.token_bytes()[ids].sum() == len(text.encode()) + 1  # the space that its normaliser puts before it
    assert len(loaded.encode("the the")) < 7
    assert loaded.token_bytes()[:3].tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
@pytest.mark.parametrize("metaspace", [False, True])
def test_names_of_tokens_in_a_text_are_text(kind: str, metaspace: bool) -> None:
    """Unigram models find their tokens anywhere in a text, special ones and bytes, too."""
    tree = byte_fallback(kind, ("▁", *"the<>/s0x41unk", "▁t", "he", "▁the", "</"))
    if metaspace:  # as newer versions of transformers write it
        words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
        tree |= {"normalizer": None, "pre_tokenizer": words}
    loaded = Tokenizer(json.dumps(tree), "names")
    text = "the</s> <0x41>x</s></s><unk> the"
    ids = loaded.encode(text)
    assert not {loaded.end_of_document, 0, 2 + 0x41} & set(ids)
    assert loaded.decode(ids) == text
    assert loaded.encode("the the")[-1:] == loaded.encode("the")


def test_fallback_without_all_bytes_is_refused() -> None:
    tree = byte_fallback("BPE")
    tree["model"]["vocab"]["<0xZZ>"] = tree["model"]["vocab"].pop("<0x41>")
    with pytest.raises(UserError, match=r"1 of the 256 bytes are not in the vocabulary, so text is lost: '<0x41>' \(0x41\)"):
        Tokenizer(json.dumps(tree), "lossy")
    tree = byte_fallback("BPE")
    tree["model"]["byte_fallback"] = False
    with pytest.raises(UserError, match=r"must be a byte-level BPE .* or fall back to bytes"):
        Tokenizer(json.dumps(tree), "lossy")


def test_an_own_text_on_which_libraries_differ_is_encoded_by_tokenizers(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Tokenizer(trained, "trained")
    assert loaded.agrees_on(TEXTS)
    ids = loaded._inner.encode(TEXTS[0], add_special_tokens=False).ids
    monkeypatch.setattr(Tokenizer, "_ids", lambda self, text: [*ids[:-1], 5])
    assert not loaded.agrees_on(TEXTS)


NAMES = ("<|mask|>", "<|sentinel_0|>", "<|sentinel_1|>")


def test_special_tokens_are_the_last_ids(tmp_path: Path) -> None:
    text = TEXTS[0]
    trained = Tokenizer(train([text], 300, NAMES), "trained")
    plain = Tokenizer(train([text], 297), "plain")
    assert trained.vocab_size == plain.vocab_size + 3 == 300
    assert [trained.decode([number]) for number in (297, 298, 299)] == list(NAMES)
    assert trained.encode(text) == plain.encode(text)
    assert trained.engine == "tiktoken"
    assert len(trained.encode(NAMES[0])) > 1  # the name in a text is ordinary text
    path = tmp_path / "plain.json"
    path.write_text(plain.text)
    given = Tokenizer.load(path, special_tokens=NAMES)
    assert Vocabulary.of(json.loads(given.text)).special == {END_OF_DOCUMENT: 0} | dict(
        zip(NAMES, range(297, 300), strict=True)
    )
    path.write_text(given.text)
    assert Tokenizer.load(path, special_tokens=NAMES).text == given.text  # those that it has stay
    assert Tokenizer.load(path, special_tokens=[*NAMES, "<|sentinel_2|>"]).vocab_size == 301


def test_special_tokens_that_cannot_be_added(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--vocab-size 259: at least 260 \(256 bytes, <\|endoftext\|> and --special-tokens\)"):
        train(["text"], 259, NAMES)
    inner = tokenizers.Tokenizer.from_str(train(["text"], 257))
    inner.add_tokens(["<|mask|>"])
    path = tmp_path / "ordinary.json"
    inner.save(str(path))
    with pytest.raises(UserError, match=r"has <\|mask\|> as an ordinary token"):
        Tokenizer.load(path, special_tokens=NAMES)
    tree = json.loads(train(["text"], 257))
    tree["model"]["vocab"]["!"] = 400  # ids 1 to 256 but one
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="leaves out ids below its largest"):
        Tokenizer.load(path, special_tokens=NAMES)
