"""benchmarks/generation.py: what the cache holds, and the rows it writes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import run

SIZES = {"width": 32, "layers": 2, "heads": 8, "prompt": 12, "batch": 3, "new-tokens": 4, "runs": 1}


def test_a_tiny_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]
    result = run(["benchmarks/generation.py", *options, "--threads", "1", "--json", str(path)])
    assert result.returncode == 0, result.stderr
    rows = json.loads(path.read_text())
    assert [(row["attention"], row["architecture"]) for row in rows] == [
        ("mha", "gpt2"),
        ("mhe_add", "gpt_bigcode"),
        ("mhe_add", "manyheads"),
        ("mhe_mul", "gpt_bigcode"),
        ("mhe_mul", "manyheads"),
    ]
    tokens, one_head = 12 + 4, 2 * 2 * 3 * 4 * 4  # keys and values, layers, batch, head_dim, bytes
    assert [row["kv_bytes"] for row in rows] == [8 * one_head * tokens, *[one_head * tokens] * 4]
    assert rows[2]["parameters"] < rows[1]["parameters"] < rows[0]["parameters"]
    assert all(row["prefill_s"] > 0 < row["token_s"] for row in rows)
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
