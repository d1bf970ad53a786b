"""`launch/prepare.py check` of a run's configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from configs.errors import UserError
from launch.prepare import check
from tests.helpers import write_run


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

    with pytest.raises(UserError, match=r"^4 faults found$"):
        check([str(path), str(tmp_path / "none"), "--model.vocab_size=5", f"--validation.sets={{wiki: {tmp_path}/b}}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: "
    assert lines[1].startswith("  model.vocab_size = 5: at least the tokenizer's size")
    assert lines[2].startswith(f"  validation.sets.wiki = '{tmp_path}/b': valid.bin is damaged (its sha256 differs")
    assert lines[3:5] == [f"{tmp_path}/none: ", "  no such folder; launch/prepare.py makes one"]
    assert lines[5:7] == [f"{tmp_path}/a: sound", f"{tmp_path}/b: "]
    assert lines[7].startswith("  valid.bin is damaged")


def test_overrides_need_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check([str(tmp_path), "--model.vocab_size=5"])
    assert "unrecognized arguments: --model.vocab_size=5" in capsys.readouterr().err
