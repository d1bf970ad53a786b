"""The communication benchmark on small sizes: rows, table, plot, and what makes it fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import communication
from benchmarks.communication import Counting, Running, fake_ranks
from launch.common import run_command
from model.costs.communication import Collective, collectives
from tests.helpers import run

SMALL = ["--heads", "8,16", "--head-dim", "8", "--tensor", "4", "--micro-batch", "2", "--sequence-length", "32"]
KEYS = {"variant", "gather", "sequence_parallel", "heads", "head_dim", "tensor", "part", "pass", "op", "calls", "bytes"}


def test_rows_table_and_plot(tmp_path: Path) -> None:
    files = ["--json", f"{tmp_path}/rows.json", "--plot", f"{tmp_path}/plot.png"]
    result = run(["benchmarks/communication.py", *SMALL, *files])
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == KEYS | {"sent_bytes"} for row in rows)
    contenders = {("mha", None), ("gqa", None), ("mhe_add", "weights"), ("mhe_add", "activations")}
    found = {(row["variant"], row["gather"], row["sequence_parallel"], row["heads"]) for row in rows}
    assert found == {(*who, sequence, heads) for who in contenders for sequence in (False, True) for heads in (8, 16)}
    assert {row["part"] for row in rows} == {"embedding", "attention", "mlp", "loss"}
    # MHA of 16 heads: hidden states of 64 tokens × 128 in two bytes are summed once in each part and pass.
    mha = [row for row in rows if (row["variant"], row["sequence_parallel"], row["heads"]) == ("mha", False, 16)]
    layer = [(row["op"], row["calls"], row["bytes"], row["sent_bytes"]) for row in mha if row["part"] in ("attention", "mlp")]
    assert layer == 4 * [("all_reduce", 1, 64 * 128 * 2, 1.5 * 64 * 128 * 2)]


@pytest.mark.parametrize(
    "change",
    [
        lambda moves: moves[1:],
        lambda moves: [*moves, Collective("loss", "bwd", "reduce_scatter", 1, 8)],
        lambda moves: [Collective(m.part, m.pass_, m.op, m.calls, m.bytes + (m.part == "mlp")) for m in moves],
    ],
)
def test_a_formula_that_is_not_the_count_fails(
    change: Callable[[list[Collective]], list[Collective]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(communication, "collectives", lambda *arguments: change(collectives(*arguments)))
    monkeypatch.setattr(sys, "argv", ["communication.py", *SMALL, "--variants", "mha"])
    with pytest.raises(SystemExit) as stopped:
        run_command(communication.main)
    assert stopped.value.code == 1
    assert "by formula" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--tensor", "3"], "parallel.tensor: 3"), (["--variants", "mhe"], "--variants mhe: known: mha, gqa")],
)
def test_what_cannot_be_sharded_is_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["communication.py", *SMALL, *options])
    with pytest.raises(SystemExit) as stopped:
        run_command(communication.main)
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_an_unknown_collective_is_an_error() -> None:
    with fake_ranks(2) as group, Counting(Running(nn.Identity())), pytest.raises(RuntimeError, match="broadcast_"):
        dist.broadcast(torch.zeros(1), src=0, group=group)
