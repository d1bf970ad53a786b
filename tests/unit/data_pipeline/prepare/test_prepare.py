"""The prepared folder: its bytes, its manifest, and what is said when it is damaged or cannot be made."""

import errno
import json
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
from data_pipeline.prepare import prepare as module
from data_pipeline.prepare.prepare import PrepareOptions, prepare
from data_pipeline.prepare.sources import ReadOptions
from data_pipeline.prepare.splitting import sample_texts
from data_pipeline.prepare.tokenizer import Tokenizer
from data_pipeline.read.manifest import SPLITS, manifest_sha256, read_manifest


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
    summary = prepare(options(tmp_path))
    folder, manifest = tmp_path / "out", summary.manifest
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


def test_equal_bytes_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 500)
    for workers in (1, 2):
        prepare(options(tmp_path, f"workers{workers}", workers=workers))
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / f"workers{n}").iterdir()} for n in (1, 2))
    assert len(first) == 9
    assert first == second


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


def test_a_split_without_documents_and_input_without_any(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one")
    one = options(tmp_path, inputs=(str(tmp_path / "one.txt"),))
    with pytest.raises(UserError, match=r"got none of the 1 documents; give more text, .*--document paragraph"):
        prepare(one)
    (tmp_path / "one.txt").write_bytes(b"\xff\n\n")
    with pytest.raises(UserError, match=r"no document that can be used \(1 not UTF-8, 1 empty\)"):
        prepare(one)
    assert not (tmp_path / "out").exists()


def test_split_with_share_zero_is_not_written(tmp_path: Path) -> None:
    assert list(prepare(options(tmp_path, split=(9, 1, 0))).manifest.splits) == ["train", "valid"]
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
    """Of 240 characters there is room for the output, but not for its temporary name; links may run in a circle."""
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (("x" * 240, "File name too long"), ("loop/out", "Too many levels of symbolic links")):
        with pytest.raises(UserError, match=message):
            prepare(options(tmp_path, name))
    odd = tmp_path / "caf\udce9.txt"
    odd.write_text("\n".join(lines(100)), encoding="utf-8")
    manifest = prepare(options(tmp_path, inputs=(str(odd),))).manifest
    assert manifest.sources[0].path == f"{tmp_path}/caf\\udce9.txt"
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_disk_full_or_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module.IndexedDatasetBuilder, "finalize", fail)
    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        prepare(options(tmp_path))
    if isinstance(error, OSError):
        assert str(raised.value) == f"{tmp_path / 'out'}: cannot be written: No space left on device"
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]


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
