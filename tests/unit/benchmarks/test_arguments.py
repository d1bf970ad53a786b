"""Arguments of the benchmarks: an output that cannot be written is reported before anything is measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.arguments import names, numbers, variants_of
from configs.errors import UserError
from model.attention.registry import attention_names
from tests.helpers import ROOT, run

WITH_JSON = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if '"--json"' in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", WITH_JSON)
def test_json_that_cannot_be_written_ends_a_benchmark_at_once(name: str, tmp_path: Path) -> None:
    part = ["packing"] if name == "data.py" else []
    result = run([f"benchmarks/{name}", *part, "--json", str(tmp_path / "none" / "rows.json")])
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("rows.json: no such folder; make it, or name another file")
    assert result.stdout == ""


def test_lists() -> None:
    assert numbers("16,64", "heads") == [16, 64]
    assert names("b,a", "kernels", ("a", "b", "c")) == ["b", "a"]
    assert names("all", "kernels", ("a", "b")) == ["a", "b"]


@pytest.mark.parametrize("text", ["", "0", "1,", "-1", "1.5", "four"])
def test_numbers_are_positive_and_whole(text: str) -> None:
    with pytest.raises(UserError, match=f"--heads {text}: positive whole numbers, separated by commas"):
        numbers(text, "heads")


def test_unknown_names_are_listed() -> None:
    with pytest.raises(UserError, match="--kernels d,e: known: a, b, all"):
        names("a,d,e", "kernels", ("a", "b"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("mha", ["mha"]),
        ("mha,mhe_add:num_seeds=4, mha", ["mha", "mhe_add:num_seeds=4"]),
        ("[mhe_add x 3, mha],mqa", ["[mhe_add x 3, mha]", "mqa"]),
        ("[mhe_add, gqa]:num_kv_heads=2:num_seeds=4", ["[mhe_add, gqa]:num_kv_heads=2:num_seeds=4"]),
    ],
)
def test_lists_of_variants(text: str, names: list[str]) -> None:
    assert variants_of(text) == names


def test_all_variants() -> None:
    every = variants_of("all")
    assert every == [name for name in attention_names() if name in every]
    assert {"mha", "gqa", "mhe_add"} <= set(every)
    assert variants_of("mhe_add:num_seeds=4,mqa,all")[:3] == ["mhe_add:num_seeds=4", "mqa", "mha"]
    assert sorted(variants_of("mqa,all")) == sorted(every)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--variants : known: mha, "),
        ("mha,mhx,", "--variants mhx,: known: mha, "),
        ("mha mqa", "--variants mha mqa: known: mha, "),
        ("[mha", "--variants [mha: known: mha, "),
        ("[mha x 2, mhx]", "--variants [mha x 2, mhx]: known: mha, "),
        ("[mha x 0]", "--variants [mha x 0]: a variant of a list must be repeated at least once"),
        ("mha:4", "--variants mha:4: after the name come fields of the model, name:field=value:field=value"),
        ("mha::num_heads=4", "--variants mha::num_heads=4: after the name come fields"),
        ("mha:heads=4", "--variants mha:heads=4: after the name come fields"),
    ],
)
def test_what_is_no_list_of_variants(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        variants_of(text)
