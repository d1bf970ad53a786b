"""Contenders by name: every variant of the registry with the fields that it needs, and models of equal cost."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.arguments import variants_of
from benchmarks.contenders import equal, load_contender
from benchmarks.training import load, table
from configs.errors import UserError
from configs.schema import Config
from launch.contenders import with_contender
from model.attention.usual import needed
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from tests.helpers import write_run

WIDE = ["--model.hidden_size=32", "--model.num_heads=8", "--model.head_dim=4"]  # heads as wide as the model, which `el` needs


def test_what_a_contender_overrides(tmp_path: Path, prepared: Path) -> None:
    path = str(write_run(tmp_path, prepared))
    assert with_contender(path, ["--run.seed=3"], "mhe_add:num_seeds=4") == [
        "--run.seed=3",
        "--model.attention=mhe_add",
        "--model.num_seeds=4",
    ]
    assert with_contender(path, [], "[mhe_add, gqa]") == ["--model.attention=[mhe_add, gqa]", "--model.num_kv_heads=2"]


@pytest.mark.parametrize("name", variants_of("all"))
def test_every_variant_gets_what_it_needs(tmp_path: Path, prepared: Path, name: str) -> None:
    """load_contender checks the model: a variant that needs a field without a usual value has to be given one."""
    model = load_contender(str(write_run(tmp_path, prepared)), WIDE, name).model
    assert model.attention == name
    assert needed(model) == {}


def test_usual_values_give_way(tmp_path: Path, prepared: Path) -> None:
    path = str(write_run(tmp_path, prepared))
    assert load_contender(path, WIDE, "gqa").model.num_kv_heads == 2  # a quarter of the heads
    assert load_contender(path, [*WIDE, "--model.num_heads=9"], "gqa").model.num_kv_heads == 1
    assert load_contender(path, WIDE, "gqa:num_kv_heads=8").model.num_kv_heads == 8
    pattern = load_contender(path, WIDE, "[mhe_add, gqa]:num_seeds=4").model
    assert (pattern.num_seeds, pattern.num_kv_heads) == (4, 2)
    with pytest.raises(UserError, match=r"--model\.attention=mhx: known: mha, "):
        load_contender(path, WIDE, "mhx")
    with pytest.raises(UserError, match=r"--model\.num_seeds=3: must divide num_heads \(8\)"):
        load_contender(path, WIDE, "mhe_add:num_seeds=3")


def some(tmp_path: Path, prepared: Path, *names: str) -> dict[str, Config]:
    path = str(write_run(tmp_path, prepared))
    return {name: load_contender(path, WIDE, name) for name in names}


def test_all_cost_what_the_first_does(tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = some(tmp_path, prepared, *variants_of("all"), "mhe_add:num_seeds=4")
    sizes = {name: sum(parameters(config.resolved(300).model).values()) for name, config in configs.items()}
    assert min(sizes.values()) < 0.9 * sizes["mha"]
    found = equal(configs, "parameters")
    assert found["mha"] == configs["mha"]
    for name, config in found.items():
        assert sum(parameters(config.resolved(300).model).values()) == pytest.approx(sizes["mha"], rel=0.005)
        assert config.model.model_copy(update={"ffn_hidden_size": None}) == configs[name].model
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(found[name] != configs[name] for name in found)
    assert f"mhe_add: model.ffn_hidden_size 128 → {found['mhe_add'].model.ffn_width}; " in "\n".join(lines)


def test_equal_caches(tmp_path: Path, prepared: Path) -> None:
    found = equal(some(tmp_path, prepared, "mqa", "mhe_mul:num_seeds=4", "gqa"), "kv_bytes")
    assert {kv_cache_bytes_per_token(config.model) for config in found.values()} == {
        2 * 2 * 4 * 2
    }  # layers, k and v, dim, bf16
    with pytest.raises(UserError, match=r"^mqa: the cache of mqa does not depend on model\.num_heads; wanted: "):
        equal(some(tmp_path, prepared, "mha", "mqa"), "kv_bytes")


def test_the_benchmark_of_training_compares_at_equal_cost(tmp_path: Path, prepared: Path) -> None:
    path = str(write_run(tmp_path, prepared))
    arguments = argparse.Namespace(config=path, variants="mha,mhe_add:num_seeds=2", match=None)
    plain = load(arguments, WIDE, tmp_path)
    arguments.match = "parameters"
    mha, mhe = load(arguments, WIDE, tmp_path).values()
    assert list(plain) == ["mha", "mhe_add:num_seeds=2"]
    assert plain["mhe_add:num_seeds=2"].model.ffn_width == mha.model.ffn_width == 128
    assert mhe.model.ffn_width > 128


def test_a_table_of_training_as_wide_as_its_names() -> None:
    row = {"parameters": 1000, "ffn_hidden_size": 96, "median_s": 0.5, "tokens_per_second": 2000.0, "peak_bytes": 2**21}
    rows = [row | {"variant": "mha", "ours": 0.01}, row | {"variant": "mhe_add:num_seeds=4", "ours": 0.02, "median_s": 0.25}]
    header, *lines = table(rows).splitlines()
    assert [line.split() for line in lines] == [
        ["mha", "1,000", "96", "500.0", "2,000", "1.00x", "2", "1.0%"],
        ["mhe_add:num_seeds=4", "1,000", "96", "250.0", "2,000", "2.00x", "2", "2.0%"],
    ]
    assert len({len(line) for line in (header, *lines)}) == 1
