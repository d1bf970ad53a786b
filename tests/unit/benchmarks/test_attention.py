"""The attention benchmark on tiny sizes, and the formulas that it divides by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.attention import measure, table
from benchmarks.attention_contenders import Shape, WrongError, build, check, contenders
from configs.schema import ModelConfig
from model.attention.shared_scores import blocks
from model.costs.flops import attention_cost, attention_pairs, shared_scores_cost
from model.positions.masks import AttentionMask
from tests.helpers import run

TEXT = {"variant", "kernel", "dtype", "device", "position", "pass"}
INTEGERS = {"heads", "head_dim", "width", "tokens", "batch", "threads", "runs", "peak_bytes", "flops", "exps"}
REAL = {"median_s", "min_s", "share_of_matmul_peak"}


def test_rows_table_and_plots(tmp_path: Path) -> None:
    sizes = ["--heads", "4,16", "--width", "32", "--tokens", "128", "--threads", "1", "--rounds", "2"]
    which = [
        "--variants",
        "mha,mhe_add,mhe_mul,mhe_add:num_seeds=2,gqa,gqa:num_kv_heads=3",
        "--kernels",
        "auto,math,sdpa_expanded,shared_scores",
    ]
    result = run(["benchmarks/attention.py", *sizes, *which, "--json", f"{tmp_path}/rows.json", "--plot", str(tmp_path)])
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    found = {(row["variant"], row["kernel"]) for row in rows}
    own = {("mhe_add", "shared_scores"), ("mhe_add", "sdpa_expanded"), ("mhe_mul", "sdpa_expanded")}
    own |= {("mhe_add:num_seeds=2", "shared_scores")}
    names = ("mha", "mhe_add", "mhe_mul", "mhe_add:num_seeds=2", "gqa")
    assert found == {(variant, kernel) for variant in names for kernel in ("auto", "math")} | own
    assert {(row["heads"], row["pass"]) for row in rows} == {(n, p) for n in (4, 16) for p in ("fwd", "fwd_bwd")}
    for row in rows:
        assert set(row) - {"chosen"} == TEXT | INTEGERS | REAL | {"causal"}
        assert all(isinstance(row[key], str) for key in TEXT)
        assert all(isinstance(row[key], int) and row[key] > 0 for key in INTEGERS)
        assert 0 < row["min_s"] <= row["median_s"]
        assert 0 < row["share_of_matmul_peak"] < 1
        assert row["head_dim"] * row["heads"] == row["width"] == 32
        assert ("chosen" in row) == (row["kernel"] == "auto")
    chosen = {row["heads"]: row["chosen"] for row in rows if row["variant"] == "mhe_add" and row["kernel"] == "auto"}
    assert chosen == {4: "sdpa", 16: "shared_scores"}
    assert all(len(line) <= 100 + len(":num_seeds=2") for line in result.stdout.splitlines())
    assert "left out: gqa:num_kv_heads=3 by auto: model.num_kv_heads = 3: must divide num_heads" in result.stderr
    assert "left out: mha by shared_scores: only the heads of mhe_add share their scores" in result.stderr
    assert (tmp_path / "attention_time.png").stat().st_size > 1000
    assert (tmp_path / "attention_memory.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--heads", "3"], "--heads 3: must divide --width 1024"),
        (["--heads", "four"], "--heads four: positive whole numbers, separated by commas"),
        (["--variants", "mhe"], "--variants mhe: known: mha, gqa, mqa"),
        (["--variants", "mhe_add:seeds=2"], "--variants mhe_add:seeds=2: after the name come fields of the model"),
        (["--kernels", "flash"], "--kernels flash: known: auto, math"),
        (["--rounds", "0"], "--rounds, --batch and --threads: at least 1"),
        (["--kernels", "sdpa_flash", "--tokens", "8"], "none of mha, mhe_add runs by sdpa_flash here"),
    ],
)
def test_mistakes(wrong: list[str], message: str) -> None:
    result = run(["benchmarks/attention.py", "--device", "cpu", *wrong])
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in result.stderr


def test_auto_is_checked_by_the_kernel_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the small size of the check, `auto` would choose another kernel, which is correct."""
    shape = Shape(16, 64, 128, 1, "float32", "none", True, "cpu")
    exact = blocks.forward

    def wrong(*arguments: Any) -> Any:
        heads_SBND, lse_SBN = exact(*arguments)
        return heads_SBND * 1.1, lse_SBN

    check(build("mhe_add", "auto", shape))
    monkeypatch.setattr(blocks, "forward", wrong)
    with pytest.raises(WrongError, match="off by"):
        check(build("mhe_add", "auto", shape))
    rows: list[dict[str, Any]] = []
    entrants = list(contenders(shape, ["mhe_add"], ["auto", "sdpa"], set(), rows))
    assert [entrant.kernel for entrant in entrants] == ["sdpa"]
    assert [(row["kernel"], row["pass"], row["error"][:13]) for row in rows] == [
        ("auto", "fwd", "wrong, off by"),
        ("auto", "fwd_bwd", "wrong, off by"),
    ]


def test_a_contender_that_fails_ends_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    shape = Shape(4, 16, 8, 1, "float32", "none", True, "cpu")
    failing, working = build("mha", "sdpa", shape), build("mhe_add", "sdpa", shape)

    def fail() -> torch.Tensor:
        raise RuntimeError("CUDA error: too many resources requested for launch\nmore")

    failing.run = fail
    rows = measure(shape, [failing, working], rounds=1, threads=1)
    assert [row.get("error") for row in rows] == ["RuntimeError: CUDA error: too many resources requested for launch"] * 2 + [
        None,
        None,
    ]
    assert all(row["median_s"] > 0 for row in rows[2:])
    assert "mha by sdpa failed: RuntimeError" in capsys.readouterr().err
    lines = table(rows).splitlines()
    assert len(lines) == 3
    assert all("mhe_add" in line for line in lines[1:])


def test_flex_stays_compiled_after_the_check() -> None:
    """Compiled code makes no products outside itself; the backward pass that CPUs lack must not undo that."""
    contender = build("mha", "flex", Shape(4, 64, 32, 1, "float32", "none", True, "cpu"))
    check(contender)
    assert contender.passes == ("fwd",)
    contender.once("fwd")
    with torch.profiler.profile() as profiler:
        contender.once("fwd")
    names = {event.name for event in profiler.events() or ()}
    assert "aten::bmm" not in names
    assert any(name.startswith("Torch-Compiled Region") for name in names)


class Products(TorchDispatchMode):
    """Adds up the FLOPs of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("mm", "addmm_"):
            first, second = args[-2:]
            self.flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        return func(*args, **kwargs or {})


def test_shared_scores_multiply_as_often_as_the_formula_says() -> None:
    """Without a causal mask, so that no product is wasted; the biases of keys, n × T, are added."""
    tokens, heads, width = 96, 5, 4
    q, k, v = (torch.randn(1, tokens, width) for _ in range(3))
    e = torch.randn(heads, width)
    pairs, key_biases = attention_pairs(tokens, causal=False), 2 * heads * width * tokens
    with Products() as forward:
        out, lse = blocks.forward(q, k, v, e, e, None, AttentionMask(False), 0.5)
    with Products() as backward:
        blocks.backward(out, q, k, v, e, e, None, AttentionMask(False), 0.5, out, lse)
    assert shared_scores_cost(heads, width, pairs, backward=False)[0] == forward.flops - key_biases
    both = forward.flops + backward.flops - 4 * key_biases  # the backward pass: the biases, their gradients to e^Q and to k
    assert shared_scores_cost(heads, width, pairs, backward=True)[0] == both


def test_costs_of_a_small_case_by_hand() -> None:
    assert [attention_pairs(3), attention_pairs(3, causal=False)] == [6, 9]
    layer = ModelConfig(attention="mhe_add", hidden_size=10, num_layers=1, num_heads=2)
    seeds = layer.model_copy(update={"num_seeds": 2})
    for backward, separate, shared in ((False, 2, 5 + 2 * 6), (True, 7, 4 * 5 + 3 * 2 * 6)):
        times = 1 + backward
        assert attention_cost(layer, 6, backward, shares_scores=False) == (2 * 6 * (2 * 5) * separate, 12 * times)
        assert attention_cost(layer, 6, backward, shares_scores=True) == (2 * 6 * shared, 6 * times)
        of_one = 5 + 6 if not backward else 4 * 5 + 3 * 6
        assert attention_cost(seeds, 6, backward, shares_scores=True) == (2 * 2 * 6 * of_one, 12 * times)
