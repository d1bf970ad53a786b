"""What words of the command mean, and `launch/prepare.py check` of a run's configuration."""

from __future__ import annotations

import shutil
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load_config
from launch.prepare import check, parse_arguments, special_tokens
from tests.helpers import write_run


def test_special_tokens_are_those_that_objectives_look_for() -> None:
    config = load_config("configs/quickstart_cpu.yaml", world_size=1)
    sentinels = [config.training.spans.sentinel.format(number) for number in range(3)]
    assert special_tokens("mask,spans:3") == (config.training.masked.token, *sentinels)
    assert special_tokens("spans:3") == tuple(sentinels)
    for text in ("", "masks", "spans", "spans:0", "spans:x", "spans:10000", "mask,mask", "spans:1,spans:2"):
        with pytest.raises(ArgumentTypeError, match=r"is not mask, spans:N|names a part twice"):
            special_tokens(text)


def test_arguments_that_do_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--input", "stdlib", "--output", str(tmp_path / "out")]
    for more, message in (
        (
            ["--special-tokens", "spans:9", "--vocab-size", "260"],
            "260, but with these --special-tokens at least 266",
        ),
        (["--near-duplicates", "0.3"], "0.3 is not between 0.5 and 1"),
    ):
        with pytest.raises(SystemExit):
            parse_arguments([*words, *more])
        assert message in capsys.readouterr().err


def test_a_configuration_and_all_folders_that_it_names(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        shutil.copytree(prepared, tmp_path / name, ignore=shutil.ignore_patterns("index"))
    ids = bytearray((tmp_path / "b" / "valid.bin").read_bytes())
    (tmp_path / "b" / "valid.bin").write_bytes(ids[:-4] + bytes([ids[-4] ^ 1]) + ids[-3:])
    path = write_run(tmp_path, tmp_path / "a")
    check([str(path)])
    assert capsys.readouterr().out == f"{path}: sound\n{tmp_path}/a: sound\n"

    sets = f"--validation.sets={{wiki: {tmp_path}/b}}"  # argparse takes words with a space for paths
    with pytest.raises(UserError, match=r"^4 faults found$"):
        check([sets, str(path), str(tmp_path / "none"), "--model.vocab_size=5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}:"
    assert lines[1].startswith("  model.vocab_size = 5: at least the tokenizer's size")
    assert lines[2].startswith(f"  validation.sets.wiki = '{tmp_path}/b': valid.bin is damaged (its sha256 differs")
    assert lines[3:5] == [f"{tmp_path}/none:", "  no such folder; launch/prepare.py makes one"]
    assert lines[5:7] == [f"{tmp_path}/a: sound", f"{tmp_path}/b:"]
    assert lines[7].startswith("  valid.bin is damaged")


def test_all_that_a_run_checks_before_it_starts(tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, prepared)
    (tmp_path / "task.jsonl").write_text('{"context": "a"}\n')
    with pytest.raises(UserError, match=r"^3 faults found$"):
        check([str(path), f"--validation.tasks={{t: {tmp_path}/task.jsonl}}", "--model.attention=none", "--data.path=/none"])
    lines = capsys.readouterr().out
    for fault in ("model.attention = 'none': known: mha", "no such folder", "line 1: "):
        assert fault in lines
    with pytest.raises(UserError, match=r"found$"):
        check([str(path), "--data.path=null", "--data.stream.input=[/none/*.zst]", "--data.stream.tokenizer=/none"])
    assert "data.stream.input" in capsys.readouterr().out


def test_overrides_need_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check([str(tmp_path), "--model.vocab_size=5"])
    assert "unrecognized arguments: --model.vocab_size=5" in capsys.readouterr().err
