"""The memory benchmark: two layouts on real ranks, formulas that are wrong, activations against sums by hand."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import memory
from benchmarks.memory import TOKENS, Row, measure_activations
from launch.common import run_command
from tests.helpers import free_port, run_ranks

LAYOUTS = ("ZeRO 2 × 2", "FSDP 2")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Rows from forked processes; test_gha_quality.py runs new ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "run_ranks", lambda work, ranks, *rest: run_ranks(work, ranks, free_port(), *rest))
        return list(memory.measure_state(LAYOUTS))


def test_two_layouts_hold_what_their_formulas_say(rows: list[Row]) -> None:
    assert [(row.layout, row.precision) for row in rows] == [
        (layout, precision) for layout in LAYOUTS for precision in ("fp32", "bf16")
    ]
    assert all(row.deviation < 0.02 for row in rows)
    zero2, zero2_bf16, *fsdp = (row.measured for row in rows)
    # By hand: 16 heads × 32 of width 256, four layers, 1024 tokens, 32 positions, everything with biases.
    attention = (256 + 1) * 3 * 32 + 3 * 16 * 32 + (512 + 1) * 256
    mlp = (256 + 1) * 1024 + (1024 + 1) * 256
    values = 1024 * 256 + 32 * 256 + 4 * (attention + mlp + 4 * 256) + 2 * 256
    assert {row.values for row in rows} == {values}
    assert (zero2.parameters, zero2_bf16.parameters) == (4 * values, 2 * values)
    for state in fsdp:
        assert state.parameters == state.accumulated == state.stepped == 2 * values
        assert state.optimizer == pytest.approx(4 * values, rel=1e-3)  # and a step for each parameter
    for state in (zero2, zero2_bf16):
        assert state.optimizer == pytest.approx(6 * values, rel=1e-3)


@pytest.mark.parametrize("wrong", [False, True])
def test_table_rows_and_a_wrong_formula(
    wrong: bool, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = rows[0].expected
    found = [replace(rows[0], expected=replace(first, stepped=first.stepped * 107 // 100)), *rows[1:]] if wrong else rows
    monkeypatch.setattr(memory, "measure_state", lambda names: iter(found))
    monkeypatch.setattr(memory, "SIZES", ((4, 8),))
    monkeypatch.setattr(sys, "argv", ["memory.py", "--json", f"{tmp_path}/rows.json"])
    with pytest.raises(SystemExit, match=r"^1$") if wrong else nullcontext():
        run_command(memory.main)
    output = capsys.readouterr()
    assert output.out.count("WRONG") == wrong
    assert all(len(line) <= 110 for line in output.out.splitlines())
    if wrong:
        assert output.err == "error: 1 of 4 rows are further than 5% from the formula\n"
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["variant"] for row in written["activations"]] == ["mha", "mqa", "mhe_add", "mhe_mul"]
    assert [row["measured"]["optimizer"] for row in written["state"]] == [row.measured.optimizer for row in rows]


@pytest.mark.parametrize(("heads", "head_dim"), [(16, 64), (128, 8)])
def test_activations_of_attention(heads: int, head_dim: int) -> None:
    """A token's floats: hidden state, Q, K and V, heads, a sum of exponentials a head.

    MHE-ADD has Q, K and V once, two sums a head and, once for all tokens, e^Q.
    """
    mha, mqa, add = (measure_activations(variant, heads, head_dim) for variant in ("mha", "mqa", "mhe_add"))
    width = heads * head_dim
    assert mha.attention == 4 * TOKENS * (1024 + 4 * width + heads)
    assert mqa.attention == 4 * TOKENS * (1024 + 2 * width + 2 * head_dim + heads)
    assert add.attention == 4 * TOKENS * (1024 + width + 3 * head_dim + 2 * heads) + 4 * width
    assert mha.block - add.block == mha.attention - add.attention
    assert mha.recomputed == add.recomputed == 4 * TOKENS * 1024


def test_an_unknown_layout_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["memory.py", "--layouts", "ZeRO 4"])
    with pytest.raises(SystemExit) as stopped:
        memory.main()
    assert stopped.value.code == 2
    assert "'ZeRO 4' is not one of" in capsys.readouterr().err
