"""SentencePiece models that are trained here: the ids in token files are those of sentencepiece itself, and text comes back."""

import io
import json
import sys
from base64 import b64encode
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import sentencepiece

from configs.errors import UserError
from data_pipeline.prepare import tokenizer as module
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.sentencepiece_model import check_ids, is_model
from data_pipeline.prepare.tokenizer import PROBES, Tokenizer, train
from data_pipeline.prepare.tokenizer_files import from_tiktoken, tokenizer_text

TEXTS = [text for _, text in sorted(topics.items())][:20]
STRANGE = [
    "naïve ﬁ ½ 東京 🙂",
    "   a  b   ",
    "<s> </s> <unk> x<0x41>y <0x0A>",
    "a <sep>b<sep>",
    "x\n\n\ty\n",
    "----------------",
]


def trained(path: Path, **changes: Any) -> bytes:
    given: dict[str, Any] = {"vocab_size": 420, "byte_fallback": True, "character_coverage": 0.99} | changes
    written = io.BytesIO()
    lines = [line for text in TEXTS for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, minloglevel=2, **given)
    path.write_bytes(written.getvalue())
    return written.getvalue()


def made(tmp_path: Path, model: Path, name: str = "out", texts: list[str] | None = None) -> list[list[int]]:
    """Documents of a folder that the model has encoded, each with the end of a document."""
    source = tmp_path / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts or [*TEXTS, *STRANGE]))
    prepare(PrepareOptions((str(source),), tmp_path / name, tokenizer=model, split=(1, 0, 0)))
    ids = np.fromfile(tmp_path / name / "train.bin", np.uint16)
    lengths = np.frombuffer((tmp_path / name / "train.idx").read_bytes(), np.int32, len(texts or [*TEXTS, *STRANGE]), 34)
    return [ids[start:stop].tolist() for start, stop in pairwise([0, *np.cumsum(lengths)])]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bpe", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
        ("bpe", {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False}),
        ("unigram", {"normalization_rule_name": "nmt_nfkc"}),
        (
            "unigram",
            {
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "add_dummy_prefix": False,
                "user_defined_symbols": ["<sep>"],
            },
        ),
    ],
)
def test_ids_are_those_of_sentencepiece(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    content = trained(tmp_path / "tokenizer.model", model_type=kind, **changes)
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    score = processor.get_score
    documents = made(tmp_path, tmp_path)  # the folder
    given = PrepareOptions((str(tmp_path / "out.jsonl"),), tmp_path / "again", tokenizer=tmp_path, split=(1, 0, 0))
    assert prepare(given).keeps_lines == (changes["normalization_rule_name"] == "identity")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    same = 0
    for text, ids in zip([*TEXTS, *STRANGE], documents, strict=True):
        expected = processor.encode(text)
        assert ids[-1] == processor.eos_id() == tokenizer.end_of_document
        assert tokenizer.decode(ids[:-1]) == processor.decode(expected)
        same += ids[:-1] == expected
        if kind == "unigram" and "<s>" in text:
            continue  # names of special tokens are cut apart
        if kind == "unigram":  # ties may be broken in another way
            assert sum(map(score, ids[:-1])) >= sum(map(score, expected)) - 1e-6
        else:
            assert ids[:-1] == expected
        if changes["normalization_rule_name"] == "identity":
            assert tokenizer.decode(ids[:-1]) == text
    assert same > len(documents) / 2
    if "user_defined_symbols" in changes:
        assert documents[-3].count(processor.piece_to_id("<sep>")) == 2
    assert processor.piece_to_id("<unk>") not in {number for ids in documents for number in ids}


def test_models_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.model"
    for changes, message in (
        ({"byte_fallback": False}, "some.model: is a SentencePiece model without byte fallback, so characters"),
        ({"model_type": "char", "vocab_size": 330}, "some.model: is a SentencePiece model of words or characters; only"),
        ({"treat_whitespace_as_suffix": True}, "some.model: is a SentencePiece model that writes spaces after words"),
        ({"user_defined_symbols": ["<sep>"]}, r"some.model: is a SentencePiece model with symbols of its own \(<sep>\)"),
        ({"eos_id": -1}, "some.model: has no token for the end of a document"),
    ):
        content = trained(path, **({"model_type": "bpe"} | changes))
        assert is_model(content)
        with pytest.raises(UserError, match=message):
            Tokenizer.load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is a SentencePiece model that is cut off or damaged"):
        Tokenizer.load(path)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(UserError, match=r"needs the packages sentencepiece and protobuf, .* pip install 'manyheads\[data\]'"):
        Tokenizer.load(path)


def test_other_ids_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers normalises a few characters otherwise, if spaces at the ends are kept: in samples, or in the user's text."""
    path = tmp_path / "some.model"
    content = trained(path, model_type="bpe", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=False)
    message = r"some.model: cannot be used: tokenizers gives other ids than sentencepiece, for .* instead of"
    with pytest.raises(UserError, match=message):
        made(tmp_path, path)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "PROBES", ())
    made(tmp_path, path, "plain", ["plain text", "more"])
    with pytest.raises(UserError, match=message):
        made(tmp_path, path, "odd", ["plain text", PROBES[2]])
    other = trained(tmp_path / "other.model", model_type="unigram")
    with pytest.raises(UserError, match="other ids"):
        check_ids(content, Tokenizer.load(tmp_path / "other.model").encode, "it", ["plain text"])
    assert other != content


def test_files_are_told_apart_by_their_content(tmp_path: Path) -> None:
    text = train(["text"], 257)
    assert not is_model(b"\n" + text.encode())
    assert not is_model(b'\n{\n  "version": 1}')
    assert not is_model(b"IQ== 0\n")
    assert not is_model(b"")
    ranks = b"".join(b"%s %d\n" % (b64encode(bytes([byte])), byte) for byte in range(256))
    (tmp_path / "tokenizer.model").write_bytes(ranks)  # as Llama 3 has it
    assert tokenizer_text(tmp_path, "llama3") == from_tiktoken(ranks, "it", "llama3")
