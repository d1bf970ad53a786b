"""From a study's file to checked children: ids, definitions, budgets, matches, and the faults of all at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.load import ConfigError, load_config
from launch.common import CHECKS, RULES
from model.costs.flops import flops_per_token
from model.costs.parameters import parameters
from pretrain.studies.children import Checker, Child, child_id
from pretrain.studies.study import read_study
from tests.helpers import write_run

DATA_CHECKS = [check for check in CHECKS if check not in RULES]


def children(folder: Path, prepared: Path, **keys: Any) -> list[Child]:
    base = write_run(folder, prepared)
    tree = {"name": "tiny", "folder": str(folder / "study"), "base": str(base), **keys}
    (folder / "study.yaml").write_text(json.dumps(tree))
    return Checker(read_study(str(folder / "study.yaml")), RULES, DATA_CHECKS).children()


def test_the_command_of_a_child_makes_the_configuration_that_was_checked(tmp_path: Path, prepared: Path) -> None:
    fields = {"model.attention": ["mha x 1", "gqa"], "model.num_kv_heads": 2, "checkpoint.keep_every": None, "backend": "fsdp"}
    found = children(
        tmp_path,
        prepared,
        set={"training.compile": False, **fields},
        parts={"p": {"set": {"run.seed": 5}, "grid": {"optimizer.lr": [1e-5, 3e-3], "training.skip_samples": [[[0, 8]]]}}},
    )
    assert [child.number for child in found] == [1, 2]
    first = found[0]
    config, path, *overrides, resume = first.arguments
    assert (config, resume) == ("--config", "--resume=auto")
    loaded = load_config(path, overrides, CHECKS)
    assert loaded.resolved(300).model_copy(update={"run": first.config.run}) == first.config
    assert Path(loaded.run.folder) == first.folder == tmp_path / "study" / "p" / first.id
    assert (loaded.optimizer.lr, loaded.run.seed, loaded.backend, loaded.checkpoint.keep_every) == (1e-5, 5, "fsdp", None)
    assert first.definition["axes"] == {"optimizer.lr": "1e-05", "training.skip_samples": "[[0, 8]]"}
    assert first.definition["set"]["training.skip_samples"] == [[0, 8]]
    assert first.flops == first.tokens * flops_per_token(first.config.model, first.config.row_length)


def test_budgets_give_the_least_steps_that_reach_them(tmp_path: Path, prepared: Path) -> None:
    grid = {"grid": {"model.num_heads": [8, 16], "training.global_batch_size": [4, 8]}}
    parts = {"steps": {**grid, "budget": {"steps": 7}}, "tokens": grid, "flops": {**grid, "budget": {"flops": 1e8}}}
    found = children(tmp_path, prepared, budget={"tokens": 1000}, parts=parts)
    by_part = {name: [child for child in found if child.part == name] for name in parts}
    assert {child.steps for child in by_part["steps"]} == {7}
    for child in by_part["tokens"]:
        of_step = child.tokens // child.steps
        assert child.tokens - of_step < 1000 <= child.tokens
    for child in by_part["flops"]:
        assert child.flops * (1 - 1 / child.steps) < 1e8 <= child.flops
    assert len({child.steps for child in by_part["flops"]}) > 2


def test_matched_children_cost_what_the_reference_does(tmp_path: Path, prepared: Path) -> None:
    variants = {
        "mha": {"model.attention": "mha"},
        "gqa": {"model.attention": "gqa", "model.num_kv_heads": 2, "model.num_layers": 1},
        "add": {"model.attention": "mhe_add"},
    }
    axes = {"variant": variants, "model.num_heads": [4, 8]}
    by_field = {"cost": "parameters", "to": {"model.attention": "mha"}}
    by_label = {"cost": "flops", "to": {"variant": "mha"}}
    one_for_all = {"cost": "parameters", "to": {"variant": "mha", "model.num_heads": 8}}
    parts = {name: {"grid": axes, "match": match} for name, match in (("f", by_field), ("l", by_label), ("o", one_for_all))}
    found = {child.name: child for child in children(tmp_path, prepared, set={"model.ffn_hidden_size": 64}, parts=parts)}
    for heads in (4, 8):
        mha = found[f"f/mha,{heads}"]
        assert mha.changed == {}
        assert found[f"f/add,{heads}"].changed.keys() == {"model.ffn_hidden_size"}
        assert found[f"f/add,{heads}"].parameters == pytest.approx(mha.parameters, rel=0.005)
        # The reference has all other fields of the child, here one layer; of a label it has none.
        one_layer = mha.config.model.model_copy(update={"num_layers": 1})
        assert found[f"f/gqa,{heads}"].parameters == pytest.approx(sum(parameters(one_layer).values()), rel=0.005)
        assert found[f"l/gqa,{heads}"].flops == pytest.approx(found[f"l/mha,{heads}"].flops, rel=0.005)
        assert found[f"o/add,{heads}"].parameters == pytest.approx(found["o/mha,8"].parameters, rel=0.005)


def test_matched_tokens_are_matched_by_steps(tmp_path: Path, prepared: Path) -> None:
    match = {"cost": "tokens", "to": {"training.global_batch_size": 8}}
    found = children(tmp_path, prepared, parts={"p": {"grid": {"training.global_batch_size": [2, 8, 16]}, "match": match}})
    assert [child.steps for child in found] == [24, 6, 3]
    assert len({child.tokens for child in found}) == 1


def test_faults_of_all_children_are_one_error(tmp_path: Path, prepared: Path) -> None:
    grid = {"model.attention": ["mha", "nonsense"], "model.num_heads": [8, 16], "optimizer.lr": [1e-3, -1]}
    with pytest.raises(UserError) as caught:
        children(tmp_path, prepared, parts={"good": {"grid": {"run.seed": [0]}}, "p": {"grid": grid}})
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path / 'study.yaml'}: 6 of 9 children cannot run"
    assert len(lines) == 3
    assert re.match(r"  p/mha,8,-1, p/mha,16,-1, p/nonsense,8,-1 and 1 more: --optimizer.lr=-1: must be", lines[1])
    assert "p/nonsense,16,0.001 and 1 more: --model.attention=nonsense: known: " in lines[2]


def test_faults_of_the_file_are_one_error(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        children(
            tmp_path,
            prepared,
            name="a b",
            jobs=0,
            checkpoint="none",
            budget={"steps": 5, "tokens": 5},
            parts={"p": {"grid": {"run.seed": [0]}, "match": {"cost": "money", "to": {"variant": "x"}}}},
        )
    keys = [line.split(" = ")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert keys == ["checkpoint", "name", "jobs", "budget", "parts.p.match.cost", "parts.p.match.to.variant"]


def test_steps_have_one_owner(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(ConfigError, match=r"set\.training\.steps = 5: the budget decides it"):
        children(tmp_path, prepared, set={"training.steps": 5}, budget={"steps": 5}, parts={"p": {"grid": {"run.seed": [0]}}})


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (("mhe_add", "64", "0.003"), "mhe_add,64,0.003"),
        (("a/b", "1"), "a-b,1-"),
        (("a,b",), "a-b-"),
        (("..",), "-"),
        (("[[0, 8]]", "é"), "0-8,-"),
        (("x" * 300,), "x" * 100 + "-"),
    ],
)
def test_ids_are_readable_safe_and_told_apart(labels: tuple[str, ...], name: str) -> None:
    found = child_id(labels)
    if name == found:
        return
    assert re.fullmatch(re.escape(name.rsplit("-", 1)[0]) + r"-[0-9a-f]{8}", found)
    assert child_id((*labels, "")) != found
