"""All variants side by side: cache and generation of small models, rows, tables, and the command on two variants."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.arguments import variants_of
from benchmarks.variants import Rows, decode, load, table, write
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from tests.helpers import run, write_run

SMALL = ["--model.hidden_size=32", "--model.num_heads=8", "--model.head_dim=4", "--model.num_layers=2"]
SMALL += ["--data.sequence_length=16", "--training.global_batch_size=2", "--training.micro_batch_size=2"]


def options(path: Path, variants: str) -> argparse.Namespace:
    counts = {"rounds": 2, "batch": 3, "prompt": 6, "new_tokens": 3}
    return argparse.Namespace(config=str(path), variants=variants, match="parameters", json=None, **counts)


def test_all_variants_are_of_equal_size_and_generate(tmp_path: Path, prepared: Path) -> None:
    arguments = options(write_run(tmp_path, prepared), "all,mhe_add:num_seeds=4,[mhe_add, mha]")
    configs = load(arguments, SMALL, tmp_path)
    assert list(configs) == [*variants_of("all"), "mhe_add:num_seeds=4", "[mhe_add, mha]"]
    found, size = dict(decode(configs, arguments)), sum(parameters(configs["mha"].resolved(300).model).values())
    for name, config in configs.items():
        model = config.resolved(300).model
        assert sum(parameters(model).values()) == pytest.approx(size, rel=0.005)
        assert found[name]["cache_bytes"] == kv_cache_bytes_per_token(model, bytes_per_value=4)
        assert found[name]["prefill_s"] > 0
        assert found[name]["decode_s"] > 0


def test_what_cannot_be_is_left_out(tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, prepared)
    configs = load(options(path, "mha,el,mhe_add:num_seeds=3,mhe_add"), [*SMALL, "--model.hidden_size=16"], tmp_path)
    assert list(configs) == ["mha", "mhe_add"]
    said = capsys.readouterr()
    el, seeds = said.err.splitlines()
    assert el.startswith("left out: el: --model.head_dim=4: el splits the hidden state into heads: ")
    assert seeds == "left out: mhe_add:num_seeds=3: --model.num_seeds=3: must divide num_heads (8)"
    assert said.out.startswith("mhe_add: model.ffn_hidden_size 64 → ")


def test_one_that_is_too_large_is_left_out(tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = load(options(write_run(tmp_path, prepared), "mhe_add:ffn_hidden_size=1,mha"), SMALL, tmp_path)
    assert list(configs) == ["mhe_add:ffn_hidden_size=1"]
    assert capsys.readouterr().err.startswith("left out: mha: with an MLP of width 1 the model has ")


def test_rows_and_ratios(tmp_path: Path) -> None:
    row = {"parameters": 2_000_000, "ffn_hidden_size": 64, "median_s": 0.5, "peak_bytes": 2**22, "cache_bytes": 1024}
    rows: Rows = {"mha": row | {"decode_s": 0.01}, "bert": row | {"median_s": 0.75, "cache_bytes": 512}}
    write(tmp_path / "rows.json", rows)
    written = (tmp_path / "rows.json").read_text()
    assert len(written.splitlines()) == 2 + len(rows)
    mha, bert = json.loads(written)
    assert mha["to_first"] == {"median_s": 1, "peak_bytes": 1, "cache_bytes": 1, "decode_s": 1}
    assert bert["to_first"] == {"median_s": 1.5, "peak_bytes": 1, "cache_bytes": 0.5}
    header, *lines = table(rows).splitlines()
    assert [line.split() for line in lines] == [
        ["mha", "2.00", "M", "64", "500.0", "1.00x", "4", "1.00x", "1,024", "1.00x", "10.00", "1.00x"],
        ["bert", "2.00", "M", "64", "750.0", "1.50x", "4", "1.00x", "512", "0.50x", "–"],
    ]
    assert len({len(line) for line in (header, *lines)}) == 1


@pytest.mark.timeout(400)
@pytest.mark.thorough  # it starts a process for each variant, which imports the engine
def test_the_command_on_two_variants(tmp_path: Path, prepared: Path) -> None:
    path, rows = write_run(tmp_path, prepared), tmp_path / "rows.json"
    counts = ["--steps", "2", "--rounds", "1", "--prompt", "8", "--new-tokens", "2", "--batch", "2", "--threads", "1"]
    chosen = ["--variants", "mha,mhe_add:num_seeds=4", "--json", str(rows)]
    result = run(["benchmarks/variants.py", "--config", str(path), *chosen, *counts, *SMALL], timeout=300)
    assert result.returncode == 0, result.stderr
    mha, mhe = json.loads(rows.read_text())
    assert mhe["parameters"] == pytest.approx(mha["parameters"], rel=0.005)
    assert mhe["model"]["ffn_hidden_size"] == mhe["ffn_hidden_size"] > mha["ffn_hidden_size"] == 128
    assert (mha["cache_bytes"], mhe["to_first"]["cache_bytes"]) == (2 * 2 * 8 * 4 * 4, 0.5)
    assert min(row[key] for row in (mha, mhe) for key in mha["to_first"]) > 0
    assert set(mha["to_first"]) == {"median_s", "peak_bytes", "cache_bytes", "prefill_s", "decode_s"}
    assert result.stdout.splitlines()[-1].startswith("mhe_add:num_seeds=4 ")
