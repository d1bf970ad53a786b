"""The prepared folder: its bytes, its manifest, and what is said when it is damaged or cannot be made."""

import errno
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import DataConfig, ModelConfig, Section
from data_pipeline.faults import data_faults
from data_pipeline.prepare import blocks, duplicates, token_writer
from data_pipeline.prepare import lines as lines_module
from data_pipeline.prepare import prepare as module
from data_pipeline.prepare.documents import ReadOptions
from data_pipeline.prepare.merge import merge
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.splitting import LONGEST_RUN, sample_texts, shorten_runs
from data_pipeline.prepare.token_writer import TokenWriter, smallest_dtype
from data_pipeline.prepare.tokenizer import Tokenizer, train
from data_pipeline.prepare.unfinished import Unfinished
from data_pipeline.read.manifest import SPLITS, Manifest, manifest_sha256, read_manifest


def lines(count: int) -> list[str]:
    source = random.Random(3)
    words = ["attention", "head", "key", "Value", "query", "naïve", "東京", "42", "soft", "max"]
    return [" ".join(source.choice(words) for _ in range(source.randrange(1, 30))) for _ in range(count)]


def options(tmp_path: Path, name: str = "out", **changes: object) -> PrepareOptions:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("\n".join([*lines(400), ""]), encoding="utf-8")
    given = {"inputs": (str(text),), "output": tmp_path / name, "vocab_size": 300, "split": (80, 10, 10)} | changes
    return PrepareOptions(read=ReadOptions("line"), **given)  # type: ignore[arg-type]


def made(given: PrepareOptions) -> Manifest:
    manifest = prepare(given).manifest
    assert manifest is not None
    return manifest


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for cutting in (blocks, lines_module):
        monkeypatch.setattr(cutting, "PIECE_BYTES", size)


def trained_tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "given.json"
    path.write_text(train(lines(50), 280))
    return path


def check_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        prepare(options(tmp_path))
    if isinstance(error, OSError):
        assert str(raised.value) == f"{tmp_path / 'out'}: cannot be written: No space left on device"


def read_megatron(prefix: Path) -> list[list[int]]:
    """Documents of a .bin/.idx pair, read from the layout in Megatron's documentation, without Megatron."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, sequences, bounds = struct.unpack("<QBQQ", index[9:34])
    assert (version, code) == (1, 8)
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    documents = np.frombuffer(index, np.int64, bounds, 34 + 12 * sequences)
    assert documents.tolist() == list(range(sequences + 1))
    tokens = prefix.with_suffix(".bin").read_bytes()
    return [np.frombuffer(tokens, np.uint16, n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]


def test_token_files_hold_every_document_once_in_order(tmp_path: Path) -> None:
    folder, manifest = tmp_path / "out", made(options(tmp_path))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    found = {split: read_megatron(folder / split) for split in SPLITS}
    written = [(split, tokenizer.decode(ids[:-1])) for split in SPLITS for ids in found[split]]
    assert all(ids[-1] == tokenizer.end_of_document for split in SPLITS for ids in found[split])
    assert sorted(text for _, text in written) == sorted(lines(400))
    for split in SPLITS:
        texts = [text for where, text in written if where == split]
        record = manifest.splits[split]
        assert texts == [text for text in lines(400) if text in set(texts)]
        assert (record.documents, record.tokens) == (len(texts), sum(map(len, found[split])))
        assert record.text_bytes == sum(len(text.encode()) for text in texts)
        assert record.documents / 400 == pytest.approx(0.8 if split == "train" else 0.1, abs=0.06)
    counts = np.load(folder / "token_counts.npy")
    assert counts.dtype == np.int64
    assert counts.tolist() == np.bincount(np.concatenate(found["train"]), minlength=300).tolist()
    assert read_manifest(folder) == manifest
    assert manifest.skipped == {"not UTF-8": 0, "empty": 0}
    assert manifest.sources[0].documents == 400


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_equal_bytes_for_any_number_of_workers_and_size_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(options(tmp_path))
    for piece in (500, 2000):
        small_pieces(monkeypatch, piece)
        summary = prepare(options(tmp_path, f"out{piece}", workers=2 if piece == 2000 else 0))
        assert summary.blocks[0] > 10
        assert contents(tmp_path / f"out{piece}") == contents(tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 9


def test_token_files_are_those_that_megatron_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    monkeypatch.setattr(token_writer, "_CHUNK", 7)
    for vocab_size in (65499, 65500):
        dtype = smallest_dtype(vocab_size)
        theirs, ours = f"{tmp_path}/theirs{vocab_size}", TokenWriter(tmp_path, f"ours{vocab_size}", dtype)
        builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=DType.optimal_dtype(vocab_size))
        draw = np.random.default_rng(1)
        for _ in range(5):
            lengths = draw.integers(1, 9, size=6)
            ids = draw.integers(0, vocab_size, size=lengths.sum())
            ours.add(ids, lengths, 0)
            for document in np.split(ids, np.cumsum(lengths)[:-1]):
                builder.add_document(document, [document.size])
        ours.finish()
        builder.finalize(f"{theirs}.idx")
        for kind in ("bin", "idx"):
            assert (tmp_path / f"ours{vocab_size}.{kind}").read_bytes() == (
                tmp_path / f"theirs{vocab_size}.{kind}"
            ).read_bytes()


def test_splits_do_not_depend_on_order_and_equal_documents_stay_together(tmp_path: Path) -> None:
    prepare(options(tmp_path))
    shuffled = tmp_path / "shuffled.txt"
    shuffled.write_text("\n".join([*reversed(lines(400)), *lines(50)]), encoding="utf-8")
    tokenizer = tmp_path / "out" / "tokenizer.json"
    prepare(options(tmp_path, "other", inputs=(str(shuffled),), tokenizer=tokenizer))
    for split in SPLITS:
        first, second = (read_megatron(tmp_path / name / split) for name in ("out", "other"))
        assert {tuple(ids) for ids in first} == {tuple(ids) for ids in second}
        assert len(second) > len(first) or split != "train"
    assert manifest_sha256(tmp_path / "out") != manifest_sha256(tmp_path / "other")


def test_sample_for_the_tokenizer_is_bounded_and_spread() -> None:
    texts = [f"{number:05d} " * 20 for number in range(1000)] + ["x" * 70000]
    sample = sample_texts(texts, 30_000, 0)
    assert 10_000 < sum(map(len, sample)) <= 30_000
    places = [int(piece[:5]) for piece in sample if piece[0] != "x"]
    assert places == sorted(places)
    assert sum(place < 500 for place in places) == pytest.approx(len(places) / 2, rel=0.3)
    assert "".join(sample_texts(texts, 10**9, 0)) == "".join(texts)


def test_text_without_spaces_costs_training_no_more_than_prose() -> None:
    """Only an eighth of it is left, in parts of which no two are joined; prose is trained on as it is."""
    draw = random.Random(1)
    prose = [" ".join(lines(200)), "-" * LONGEST_RUN + "\n" + " " * (LONGEST_RUN - 1) + "x" * LONGEST_RUN]
    assert shorten_runs(prose, 0) == prose
    assert "".join(shorten_runs([*prose * 9, "x" * 300], 0)).endswith("x" * 256 + " " + "x" * 44)
    for letters in ("ACGT", "".join(map(chr, range(0x4E00, 0x5600))), "=-+*", "0123456789"):
        texts = ["".join(draw.choice(letters) for _ in range(60_000)) for _ in range(5)]
        short = shorten_runs(texts, 0)
        assert shorten_runs(texts, 0) == short
        assert 300_000 / 16 < sum(map(len, short)) < 300_000 / 6
        assert max(len(word) for text in short for word in text.split()) <= LONGEST_RUN
        assert all(word in text for text, parts in zip(texts, short, strict=True) for word in parts.split())


def test_a_split_without_documents_and_input_without_any(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one")
    one = options(tmp_path, inputs=(str(tmp_path / "one.txt"),))
    with pytest.raises(UserError, match=r"got none of the 1 documents; give more text, .*--document paragraph"):
        prepare(one)
    (tmp_path / "one.txt").write_bytes(b"\xff\n\n")
    with pytest.raises(UserError, match=r"no document that can be used \(1 not UTF-8, 1 empty\)"):
        prepare(one)
    (tmp_path / "one.jsonl").touch()
    nothing = options(tmp_path, inputs=(str(tmp_path / "one.jsonl"),), deduplicate=True, near_duplicates=0.8)
    with pytest.raises(
        UserError, match=r"no document that can be used \(0 not UTF-8, 0 empty, 0 duplicate, 0 near duplicate\)"
    ):
        prepare(nothing)
    assert not (tmp_path / "out").exists()


def test_split_with_share_zero_is_not_written(tmp_path: Path) -> None:
    assert list(made(options(tmp_path, split=(9, 1, 0))).splits) == ["train", "valid"]
    assert not (tmp_path / "out" / "test.bin").exists()


def test_output_is_replaced_only_when_told_and_only_when_ours(tmp_path: Path) -> None:
    prepare(options(tmp_path))
    before = manifest_sha256(tmp_path / "out")
    with pytest.raises(UserError, match="already holds prepared data; --overwrite replaces it"):
        prepare(options(tmp_path, seed=5))
    prepare(options(tmp_path, seed=5, overwrite=True))
    assert manifest_sha256(tmp_path / "out") != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no prepared data; name another folder"):
            prepare(options(tmp_path, "mine", overwrite=overwrite))
    with pytest.raises(UserError, match="is a file"):
        prepare(options(tmp_path, "text.txt"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "out", "text.txt"]


def test_odd_names(tmp_path: Path) -> None:
    """Of 250 characters there is room for the output, but not for its temporary name; links may run in a circle."""
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (("x" * 250, "File name too long"), ("loop/out", "Too many levels of symbolic links")):
        with pytest.raises(UserError, match=message):
            prepare(options(tmp_path, name))
    odd = tmp_path / "caf\udce9.txt"
    odd.write_text("\n".join(lines(100)), encoding="utf-8")
    manifest = made(options(tmp_path, inputs=(str(odd),)))
    assert manifest.sources[0].path == f"{tmp_path}/caf\\udce9.txt"
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_disk_full_or_interrupted_leaves_what_a_second_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "finish", fail)
        check_failure(tmp_path, error)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.partial", "text.txt"]
    with pytest.raises(
        UserError, match=r"unfinished work with other inputs or options: --seed; give the same .* or --overwrite"
    ):
        prepare(options(tmp_path, seed=5))
    assert prepare(options(tmp_path)).text_bytes == 0  # nothing was left to encode
    prepare(options(tmp_path, "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "text.txt", "whole"]


def test_interrupted_without_a_finished_block_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encode", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]


def test_killed_after_the_output_has_appeared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "close", lambda self, keep: self._release())
        prepare(options(tmp_path))
    assert (tmp_path / ".out.partial").is_dir()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="already holds prepared data"):
        prepare(options(tmp_path))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "text.txt"]
    assert contents(tmp_path / "out") == before


def test_overwrite_discards_unfinished_work_with_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "finish", fail)
        check_failure(tmp_path, KeyboardInterrupt())
    prepare(options(tmp_path, seed=5, overwrite=True))
    prepare(options(tmp_path, "whole", seed=5))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_commands_for_one_output(tmp_path: Path) -> None:
    first = Unfinished(tmp_path / "out", {})
    first.open(discard=False)
    with pytest.raises(UserError, match=rf"out: another command is preparing it now \(process {os.getpid()} on "):
        prepare(options(tmp_path))
    first.close(keep=False)
    prepare(options(tmp_path))


@pytest.mark.parametrize("given", [False, True])
def test_shards_of_several_machines_are_merged_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    small_pieces(monkeypatch, 1000)
    tokenizer = {"tokenizer": trained_tokenizer(tmp_path)} if given else {}
    prepare(options(tmp_path, "whole", deduplicate=True, **tokenizer))
    shards = [tmp_path / f"shard{number}" for number in (1, 2, 3)]
    for number, shard in enumerate(shards, start=1):
        summary = prepare(options(tmp_path, shard.name, deduplicate=True, shard=(number, 3), **tokenizer))
        assert 0 < summary.blocks[0] < summary.blocks[1]
    merge(shards[::-1], tmp_path / "out", overwrite=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for some, message in (
        (shards[:2], r"merge needs the shards 1/3 to 3/3, each once; given: 1/3, 2/3"),
        ([shards[0], tmp_path / "whole"], "whole: is no shard that launch/prepare.py --shard has written"),
    ):
        with pytest.raises(UserError, match=message):
            merge(some, tmp_path / "again", overwrite=False)
    prepare(options(tmp_path, "other", shard=(3, 3), seed=7, **tokenizer))
    with pytest.raises(UserError, match=r"other: differs from .*shard1 in: recipe"):
        merge([*shards[:2], tmp_path / "other"], tmp_path / "again", overwrite=False)
    next((shards[1] / "blocks").iterdir()).unlink()
    with pytest.raises(UserError, match=r"shard2/blocks/\d+\.npz: is missing"):
        merge(shards, tmp_path / "again", overwrite=False)


def test_duplicates_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 1000)
    monkeypatch.setattr(duplicates, "MOST_AT_ONCE", 30)
    texts = [*lines(400), *lines(300)]
    (tmp_path / "twice.txt").write_text("\n".join(texts), encoding="utf-8")
    summary = prepare(options(tmp_path, inputs=(str(tmp_path / "twice.txt"),), deduplicate=True))
    assert summary.manifest is not None
    assert summary.manifest.skipped["duplicate"] == 700 - len(set(texts))
    prepare(options(tmp_path, "once"))
    firsts = list(dict.fromkeys(texts))
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    found = {split: [tokenizer.decode(ids[:-1]) for ids in read_megatron(tmp_path / "out" / split)] for split in SPLITS}
    assert sorted(text for texts in found.values() for text in texts) == sorted(firsts)
    assert all(texts == [text for text in firsts if text in set(texts)] for texts in found.values())


def test_length_filters_count_and_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x" * n, "id": n}) + "\n" for n in (2, 3, 4, 5, 6, 5, 4)))
    read = ReadOptions(id_field="id", min_characters=3, max_characters=5)
    summary = prepare(PrepareOptions((str(tmp_path / "a.jsonl"),), tmp_path / "out", 257, split=(1, 0, 0), read=read))
    assert summary.manifest is not None
    assert summary.manifest.splits["train"].documents == 5
    assert list(summary.skips.lines()) == [
        "0 not UTF-8",
        "0 empty",
        f"1 too short: {tmp_path}/a.jsonl:1 (id 2)",
        f"1 too long: {tmp_path}/a.jsonl:5 (id 6)",
    ]


def test_first_skipped_documents_are_named_by_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 400)
    bad = {17: b"\xff", 200: b"\xff", 390: b"\xff"}
    content = [bad.get(number, text.encode()) for number, text in enumerate(lines(400), start=1)]
    (tmp_path / "b.txt").write_bytes(b"\n".join(content))
    skips = prepare(options(tmp_path, inputs=(str(tmp_path / "b.txt"),))).skips
    named = ", ".join(f"{tmp_path}/b.txt:{number}" for number in bad)
    assert next(skips.lines()) == f"3 not UTF-8: {named}"


def config(folder: Path, length: int = 16, vocab_size: int | None = None) -> dict[str, Section]:
    model = ModelConfig(hidden_size=8, num_layers=1, num_heads=2, vocab_size=vocab_size)
    return {"model": model, "data": DataConfig(path=str(folder), sequence_length=length)}


def test_faults_of_a_prepared_folder(tmp_path: Path) -> None:
    prepare(options(tmp_path, split=(9, 1, 0)))
    folder = tmp_path / "out"
    assert data_faults(config(folder)) == []
    tokens = read_manifest(folder).splits["valid"].tokens
    assert data_faults(config(folder, tokens - 1)) == []
    assert [str(fault) for fault in data_faults(config(folder, tokens))] == [
        f"data.sequence_length = {tokens}: at most {tokens - 1}: split valid has {tokens} tokens; or prepare more text"
    ]
    assert [(fault.key, fault.allowed) for fault in data_faults(config(folder, vocab_size=299))] == [
        ("model.vocab_size", "at least the tokenizer's size (300), or null")
    ]
    assert "no documents in split test" in data_faults(config(folder), ["test"])[0].allowed


def test_faults_of_what_sections_there_are(tmp_path: Path) -> None:
    prepare(options(tmp_path))
    sections = config(tmp_path / "out", length=10**6, vocab_size=299)
    assert [fault.key for fault in data_faults(sections)] == ["data.sequence_length"] * 2 + ["model.vocab_size"]
    assert [fault.key for fault in data_faults({"data": sections["data"]})] == ["data.sequence_length"] * 2
    assert data_faults({"model": sections["model"]}) == []


def test_faults_of_damaged_and_missing_folders(tmp_path: Path) -> None:
    assert "launch/prepare.py makes one" in data_faults(config(tmp_path / "none"))[0].allowed
    assert "has no manifest.json" in data_faults(config(tmp_path))[0].allowed
    prepare(options(tmp_path))
    folder = tmp_path / "out"
    for name in ("train.bin", "valid.idx"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    (folder / "tokenizer.json").write_text("{}")
    (folder / "token_counts.npy").unlink()
    faults = "\n".join(map(str, data_faults(config(folder))))
    for part in ("train.bin has", "valid.idx has", "token_counts.npy is missing", "tokenizer.json is not the one"):
        assert part in faults
    tree = json.loads((folder / "manifest.json").read_text())
    for content, message in (
        (json.dumps(tree | {"format_version": 9}), "format version 9, this program reads 1"),
        (json.dumps(tree | {"splits": 3}), "is damaged"),
        ("[1]", "is damaged"),
        ("{", "is damaged"),
    ):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_manifest(folder)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--input", "none.txt", "--output", "out"], 1, "error: --input none.txt: no such file or folder\n"),
        (["--input", "x" * 300, "--output", "out"], 1, ": cannot be read: File name too long\n"),
        (["--input", "/dev/null", "--output", "out"], 1, "error: --input /dev/null: is neither a file nor a folder\n"),
        (["--input", "stdlib", "--output", "x" * 300], 1, ": cannot be used: File name too long\n"),
        (["--input", "stdlib", "--output", "out\udcff"], 1, ": the name is not UTF-8"),
        (["--input", "stdlib", "--output", "out", "--split", "0,1,1"], 2, "make it above 0, or name a tokenizer with"),
        (["--input", "stdlib", "--output", "out", "--split", "0,0,0"], 2, "none negative, one above 0"),
        (["--input", "stdlib", "--output", "out", "--vocab-size", "12"], 2, "12 is not between 257 and"),
        (["--help"], 0, ""),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], status: int, message: str) -> None:
    command = [sys.executable, "launch/prepare.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert status or "(default: 8192)" in done.stdout
