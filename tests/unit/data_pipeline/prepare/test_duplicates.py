"""Duplicates and near duplicates, against the Jaccard similarity of sets of words in a row, computed pair by pair."""

import importlib.metadata
import json
import random
import sys
from itertools import combinations
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from configs.errors import UserError
from data_pipeline.prepare import blocks, duplicates
from data_pipeline.prepare import lines as lines_module
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.merge import merge
from data_pipeline.prepare.minhash import PERMUTATIONS, RECALL, Resemblance, Signer
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.tokenizer import train


def families(count: int, length: tuple[int, int], most_changes: int) -> list[list[str]]:
    """Documents as words, each with up to two copies in which up to so many words are replaced, in drawn order."""
    draw = random.Random(1)
    words = [f"w{number}" for number in range(3000)]
    found = []
    for _ in range(count):
        original = [draw.choice(words) for _ in range(draw.randrange(*length))]
        found.append(original)
        for _ in range(draw.randrange(3)):
            copy = list(original)
            for _ in range(draw.randrange(1 + most_changes)):
                copy[draw.randrange(len(copy))] = draw.choice(words)
            found.append(copy)
    draw.shuffle(found)
    return found


def similarities(texts: list[list[str]]) -> dict[tuple[int, int], float]:
    """Of all pairs."""
    sets = [{tuple(words[place : place + 5]) for place in range(max(1, len(words) - 4))} for words in texts]
    pairs = combinations(range(len(sets)), 2)
    return {(left, right): len(sets[left] & sets[right]) / len(sets[left] | sets[right]) for left, right in pairs}


def options(tmp_path: Path, name: str, texts: list[str], **changes: object) -> PrepareOptions:
    source, tokenizer = tmp_path / "text.jsonl", tmp_path / "tokenizer.json"
    if not source.exists():
        source.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)))
        tokenizer.write_text(train(texts, 300))
    given = {"split": (9, 1, 0), "tokenizer": tokenizer, "near_duplicates": 0.8} | changes
    return PrepareOptions((str(source),), tmp_path / name, read=ReadOptions(id_field="id"), **given)  # type: ignore[arg-type]


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for cutting in (blocks, lines_module):
        monkeypatch.setattr(cutting, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(duplicates, "MOST_AT_ONCE", 100)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stopped(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_signatures_estimate_the_jaccard_similarity() -> None:
    texts = families(60, (3, 200), 8)
    signer = Signer()
    signatures = [signer.sign(" ".join(text)) for text in texts]
    errors = [
        float((signatures[left] == signatures[right]).mean()) - exact
        for (left, right), exact in similarities(texts).items()
        if 0.02 < exact < 0.98
    ]
    assert len(errors) > 40
    assert abs(np.mean(errors)) < 0.015
    assert np.std(errors) < 1 / (2 * PERMUTATIONS**0.5)
    assert signatures[0].dtype == np.uint32
    assert signatures[0].shape == (PERMUTATIONS,)


@pytest.mark.parametrize(
    ("left", "right", "exact"),
    [
        ("One two, three four five!", "one TWO three  four\nfive", 1.0),
        ("one two three", "one two three", 1.0),
        ("one two three", "three two one", 0.0),
        ("??? !!!", "??? !!!", 1.0),
        ("???", "!!!", 0.0),
        ("a b c d e f g h", "a b c d e f g x", 3 / 5),
        ("我们今天去北京大学", "我们今天去北京大學", 4 / 6),  # 9 characters, 5 runs of 5; the last one differs
        ("naïve café a b c d e f", "naïve café a b c d e F!", 1.0),
    ],
)
def test_a_document_is_the_set_of_its_runs_of_five_words(left: str, right: str, exact: float) -> None:
    first, second = (Signer().sign(text) for text in (left, right))
    assert float((first == second).mean()) == pytest.approx(exact, abs=3 * (exact * (1 - exact) / PERMUTATIONS) ** 0.5)


def test_of_documents_alike_the_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like going through all documents and comparing each with all that stay so far."""
    small(monkeypatch)
    texts = families(80, (100, 200), 1)
    pairs = similarities(texts)
    assert not any(0.3 < exact < 0.8 for exact in pairs.values())
    stay: list[int] = []
    copies: list[tuple[int, int]] = []
    for number in range(len(texts)):
        alike = [other for other in stay if pairs[other, number] > 0.6]
        copies += [(number, alike[0])] if alike else []
        stay += [] if alike else [number]
    summary = prepare(options(tmp_path, "out", [" ".join(text) for text in texts], near_duplicates=0.6))
    assert summary.manifest is not None
    assert sum(split.documents for split in summary.manifest.splits.values()) == len(stay)
    assert summary.manifest.skipped["near duplicate"] == len(copies) > 30
    (line,) = [line for line in summary.skips.lines() if "near duplicate" in line]
    assert line.startswith(f"{len(copies)} near duplicate: ")
    named = line.partition(": ")[2].removesuffix(" …").split("), ")
    assert len(named) == 5
    for text, (copy, original) in zip(named, copies, strict=False):
        place = tmp_path / "text.jsonl"
        beginning, _, end = text.removesuffix(")").partition(" of ")
        assert beginning.startswith(f"{place}:{copy + 1} (id {copy}) (")
        assert float(beginning[-4:]) == pytest.approx(pairs[original, copy], abs=0.1)
        assert end.removesuffix(")") == f"{place}:{original + 1} (id {original}"


def test_equal_bytes_however_the_work_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(text) for text in families(80, (30, 150), 3)]
    texts += texts[:10]
    prepare(options(tmp_path, "whole", texts, deduplicate=True))
    small(monkeypatch)
    summary = prepare(options(tmp_path, "out", texts, deduplicate=True, workers=2))
    assert summary.blocks[0] > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for place in ("_resembling", "SignatureFile"):  # stopped while near duplicates are looked for
        with monkeypatch.context() as patch:
            patch.setattr(duplicates, place, stopped)
            with pytest.raises(KeyboardInterrupt):
                prepare(options(tmp_path, "stopped", texts, deduplicate=True))
    resumed = prepare(options(tmp_path, "stopped", texts, deduplicate=True))
    assert resumed.text_bytes == 0  # all blocks were there
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    shards = [tmp_path / f"shard{number}" for number in (1, 2)]
    for number, shard in enumerate(shards, start=1):
        prepare(options(tmp_path, shard.name, texts, deduplicate=True, shard=(number, 2)))
    with monkeypatch.context() as patch:  # signatures are all that merging needs
        patch.setitem(sys.modules, "datasketch", None)
        merge(shards, tmp_path / "merged", overwrite=False)
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    counts = [line.partition(":")[0] for line in summary.skips.lines()]
    assert counts[2] == f"{len(texts) - len(set(texts))} duplicate"
    assert int(counts[3].removesuffix(" near duplicate")) > 20
    prepare(options(tmp_path, "other", texts, deduplicate=True, shard=(1, 2), near_duplicates=0.9))
    with pytest.raises(UserError, match=r"shard2 in: recipe"):
        merge([shards[1], tmp_path / "other"], tmp_path / "again", overwrite=False)


def test_exact_duplicates_are_named_with_their_originals(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\none\n")
    (tmp_path / "b.txt").write_text("two\nthree\n")
    read = ReadOptions("line")
    given = PrepareOptions((str(tmp_path),), tmp_path / "out", 257, split=(1, 0, 0), read=read, deduplicate=True)
    assert list(prepare(given).skips.lines())[2] == (
        f"2 duplicate: {tmp_path}/a.txt:3 (as {tmp_path}/a.txt:1), {tmp_path}/b.txt:1 (as {tmp_path}/a.txt:2)"
    )


def test_documents_as_alike_as_the_threshold_meet() -> None:
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0):
        chosen = Resemblance(threshold, Resemblance.of(threshold).rows, "")
        meet = 1 - (1 - threshold**chosen.rows) ** chosen.bands
        assert meet >= RECALL
        more = chosen.rows + 1
        assert more > PERMUTATIONS or 1 - (1 - threshold**more) ** (PERMUTATIONS // more) < RECALL
    values = np.random.default_rng(0).integers(0, 4, (50, PERMUTATIONS)).astype(np.uint32)
    band = Resemblance(0.9, 2, "").keys(values)[3]
    equal = (values[:, None, 6:8] == values[None, :, 6:8]).all(axis=2)
    assert ((band[:, None] == band[None, :]) == equal).all()


def test_a_missing_library_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"^--near-duplicates: needs .* datasketch, .* pip install 'manyheads\[data\]'"):
        prepare(options(tmp_path, "out", ["some text"]))
