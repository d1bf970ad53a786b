"""What goes into the comparison of ways to prepare text, and what is made of the figures."""

import json
from pathlib import Path

import pytest

from benchmarks.data_contenders import DOCUMENT, FIGURES, parts, summary, write
from benchmarks.prepare import peaks


def test_texts(tmp_path: Path) -> None:
    text = "".join(f"第{number}行\n" for number in range(3000))
    cut = list(parts(text))
    assert "".join(cut) == text
    assert len(cut) > 3
    assert all(part.endswith("\n") for part in cut)
    assert all(DOCUMENT <= len(part) < DOCUMENT + 10 for part in cut[:-1])
    megabytes = write(tmp_path / "text.jsonl", ["one", "zwei", "три"], 100)
    written = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert megabytes == sum(len(part.encode()) for part in written) / 1e6 >= 1e-4
    assert written[:5] == ["one", "zwei", "три", "1 one", "1 zwei"]
    assert len(set(written)) == len(written)


def test_figures() -> None:
    speeds = {"prepare.py": (4.0, 6.0, 5.0), "other": (1.0, 2.5, 9.0)}
    measured = [
        {"text": "English", "megabytes": 8.0, "contender": name} | dict.fromkeys(FIGURES, speeds[name][turn])
        for turn in range(3)
        for name in speeds
    ]
    ours, other = summary(measured)
    assert (ours["rounds"], ours[FIGURES[0]], ours[f"of_prepare_{FIGURES[0]}"]) == (3, 5.0, 1.0)
    assert (other[FIGURES[1]], other[f"of_prepare_{FIGURES[1]}"]) == (2.5, 0.5)
    assert peaks([1_000_000, 5_000_000, 2_000_000, 3_000_000], 2) == pytest.approx([5.0, 3.0])
