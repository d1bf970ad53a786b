"""What is read of a run's metrics, and what is no metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from pretrain.report.records import read_metrics


def test_lines_are_read_and_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "file") == []  # training says what is wrong with that folder
    for end in ("", '{"step": 3, "lo', "\0" * 9):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n' + end)
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')  # complete but for its end
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize(
    "second", [b"\x89PNG\r\x00", b"\xff\xfe{", b"step 2", b"[2]", b'{"other": 1}', b'{"step": "2"}', b"[" * 200_000, b""]
)
def test_anything_else_is_an_error_that_names_the_line(tmp_path: Path, second: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + second + b'\n{"step": 3}\n')
    message = f"^{tmp_path}/metrics.jsonl: is damaged .line 2 is no JSON object with a step.; mend it or move it away$"
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path)
