"""Bytes of token ids against the text that they are decoded to."""

from __future__ import annotations

import json

import tokenizers

from data_pipeline.prepare.tokenizer import train
from data_pipeline.read.token_bytes import token_bytes


def test_bytes_are_those_of_the_text() -> None:
    inner = tokenizers.Tokenizer.from_str(train(["naïve café 東京 and some plain words, some words"] * 4, 290))
    inner.add_tokens([tokenizers.AddedToken("müsli", normalized=False)])
    inner.add_special_tokens(["<pad>"])
    counts = token_bytes(json.loads(inner.to_str()))
    text = "plain words, müsli 東京, café; \x00 and 🙂"
    ids = inner.encode(text).ids
    assert inner.token_to_id("müsli") in ids
    assert counts[ids].sum() == len(text.encode())
    assert [counts[inner.token_to_id(name)] for name in ("müsli", "<pad>", "<|endoftext|>")] == [6, 0, 0]
    assert len(counts) == inner.get_vocab_size()


def test_ids_that_the_tokenizer_lacks_are_no_text() -> None:
    tree = {"model": {"vocab": {"a": 0, "bc": 4}}, "added_tokens": [{"id": 6, "special": True, "content": "<end>"}]}
    assert token_bytes(tree).tolist() == [1, 0, 0, 0, 2, 0, 0]
    assert token_bytes({**tree, "added_tokens": []}).tolist() == [1, 0, 0, 0, 2]
