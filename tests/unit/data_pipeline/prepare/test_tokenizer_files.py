"""Tokenizers out of tiktoken's files and folders of transformers, and where tiktoken may stand in for tokenizers."""

import base64
import json
import random
from itertools import product
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.errors import UserError
from data_pipeline.prepare.fast_encoding import GPT2_PATTERN, PATTERNS, fast_encoding, same_merges, symbol_bytes
from data_pipeline.prepare.tokenizer import Tokenizer, train
from data_pipeline.prepare.tokenizer_files import BY_RANKS, tokenizer_text

TEXTS = [Path(random.__file__).read_text(encoding="utf-8"), Path(json.__file__).read_text(encoding="utf-8")]


def trained(pattern: str) -> str:
    """A byte-level BPE with another pattern, made by the tokenizers library alone."""
    inner = tokenizers.Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(parts)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return inner.to_str()


def ranks_of(text: str) -> dict[bytes, int]:
    """Tokens by their bytes, numbered from 0, without the special one."""
    byte_of = symbol_bytes()
    vocabulary = {name: number for name, number in json.loads(text)["model"]["vocab"].items() if name != "<|endoftext|>"}
    return {bytes(byte_of[symbol] for symbol in name): number - 1 for name, number in vocabulary.items()}


def tiktoken_file(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def random_texts(count: int) -> list[str]:
    draw = random.Random(3)
    kinds = [(32, 127), (9, 14), (0x41, 0x17F), (0x2000, 0x2FFF), (0x3000, 0xD800), (0xE000, 0x110000), (0x660, 0x66A)]
    return ["".join(chr(draw.randrange(*draw.choice(kinds))) for _ in range(40)) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_tiktoken_files_give_the_ids_of_tiktoken(tmp_path: Path, name: str) -> None:
    ranks = ranks_of(trained(PATTERNS[name]))
    file = tiktoken_file(tmp_path / "a.tiktoken", ranks)
    reference = tiktoken.Encoding("reference", pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer.load(file, name)
    assert (ours.engine, ours.vocab_size, ours.end_of_document) == ("tiktoken", 500, 499)
    slow = Tokenizer(ours.text, "slow", fast=False)
    for text in [*TEXTS, *random_texts(200), "a \n \f", "a\r\n", "a\n\n  "]:
        expected = reference.encode_ordinary(text)
        assert ours.encode(text) == expected
        assert slow.encode(text) == expected
        assert ours.decode(expected) == text
    (tmp_path / "folder").mkdir()
    tiktoken_file(tmp_path / "folder" / "b.tiktoken", ranks)
    assert Tokenizer.load(tmp_path / "folder", name).text == ours.text


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_what_is_known_of_published_files(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """tiktoken writes the patterns in another way, for speed; they must give the same words."""
    from tiktoken_ext import openai_public

    pairs = {bytes([byte]): byte for byte in range(256)}
    pairs |= {bytes(pair): 256 + number for number, pair in enumerate(product(range(256), repeat=2))}  # show where words end
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: pairs)
    parameters = getattr(openai_public, name)()
    (known,) = (known for known in BY_RANKS.values() if known.name == name)
    assert parameters["special_tokens"][known.end_of_document[0]] == known.end_of_document[1]
    theirs, ours = (
        tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=pairs, special_tokens={})
        for pattern in (parameters["pat_str"], PATTERNS[known.pattern])
    )
    for text in [*TEXTS, *random_texts(2000), "a \n \f", "a\r\n", "a\n\n  "]:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_bad_tiktoken_files(tmp_path: Path) -> None:
    ranks = ranks_of(trained(GPT2_PATTERN))
    file = tiktoken_file(tmp_path / "a.tiktoken", ranks)
    with pytest.raises(UserError, match=r"has 499 ids, so it is none of r50k_base .*say with --tiktoken-pattern"):
        Tokenizer.load(file)
    file.write_bytes(file.read_bytes() + b"????? 12\n")
    with pytest.raises(UserError, match=r"a\.tiktoken:500: is not a token in base64 and its id"):
        Tokenizer.load(file, "gpt2")
    tiktoken_file(file, ranks | {b"zzz": 3})
    with pytest.raises(UserError, match="one id to several tokens"):
        Tokenizer.load(file, "gpt2")
    (tmp_path / "tokenizer.json").write_text(train(TEXTS, 300))
    with pytest.raises(UserError, match="is no tiktoken file, so leave --tiktoken-pattern out"):
        Tokenizer.load(tmp_path / "tokenizer.json", "gpt2")


def test_folders_of_transformers(tmp_path: Path) -> None:
    text = train(TEXTS, 400)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(text), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "folder")
    ours = Tokenizer.load(tmp_path / "folder")
    for sample in [*TEXTS, *random_texts(20)]:
        assert ours.encode(sample) == tokenizer(sample, add_special_tokens=False)["input_ids"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no tokenizer\.json; name a folder that save_pretrained"):
        tokenizer_text(tmp_path / "empty")


def test_merges_that_tiktoken_would_not_follow() -> None:
    """If "abc" may be made of "ab" and "c" only, tiktoken still makes it of "a" and "bc", where "bc" is merged first."""
    letters = {bytes([byte]): byte for byte in range(256)}
    pair = {b"bc": 256, b"ab": 257, b"abc": 258}
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    assert not same_merges(letters | pair, merges, words_first=False)
    assert same_merges(letters | pair, [*merges[:2], (b"a", b"bc")], words_first=False)
    swapped = {b"ab": 256, b"bc": 257, b"abc": 258}
    assert same_merges(letters | swapped, [merges[1], merges[0], merges[2]], words_first=False)
    assert not same_merges(letters | swapped, merges, words_first=False)  # not in the order of ids
    unmade = letters | {b"xyz": 256}
    assert same_merges(unmade, [], words_first=True)
    assert not same_merges(unmade, [], words_first=False)


def test_unknown_patterns_and_added_tokens_are_left_to_tokenizers() -> None:
    tree = json.loads(trained(r"\p{L}+|\s+|[^\p{L}\s]+"))
    assert fast_encoding(tree) is None
    tree = json.loads(trained(PATTERNS["cl100k"]))
    assert fast_encoding(tree) is not None
    added = {
        "id": 500,
        "content": "zebra",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    tree["added_tokens"].append(added)
    assert fast_encoding(tree) is None
    exact = Tokenizer(json.dumps(tree), "added")
    assert exact.encode("a zebra")[-1] == 500
    assert exact.token_bytes()[500] == 5


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_added_tokens_that_take_spaces_away_are_refused(side: str) -> None:
    inner = tokenizers.Tokenizer.from_str(train(TEXTS, 300))
    inner.add_tokens([tokenizers.AddedToken("zebra", **{side: True})])
    with pytest.raises(UserError, match=r"striping: does not give text back unchanged: .* comes back as"):
        Tokenizer(inner.to_str(), "striping")
    inner = tokenizers.Tokenizer.from_str(train(TEXTS, 300))
    inner.add_tokens([tokenizers.AddedToken("zebra")])
    assert Tokenizer(inner.to_str(), "plain").encode("zebra") == [300]
