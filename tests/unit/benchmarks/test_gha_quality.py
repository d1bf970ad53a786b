"""The bookkeeping of benchmarks/gha_quality.py: which heads a draw keeps, finished runs, means by hand; one tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from benchmarks.gha_quality import WAYS, Result, Results, jobs, random_election, settle, summary
from configs.errors import UserError
from model.gha.voting import Election, LayerElection
from tests.helpers import run

NO_MARGINS = (0.0, 0.0, 0.0)
LAYERS = (  # groups 0 and 1 have three members each, group 2 none; then one of one, one of two, one of three
    LayerElection((0, 0, 0, 1, 1, 1), (0.0,) * 6, (0, 1, 3), NO_MARGINS),
    LayerElection((0, 1, 1, 2, 2, 2), (0.0,) * 6, (0, 1, 3), NO_MARGINS),
)
ELECTION = Election(step=7, feature_map="value", ballot="votes", ballots=5, heads_per_group=1, groups=3, layers=LAYERS)


def result(seed: int, way: str, pruned_loss: float, loss: float, heads: int = 16) -> Result:
    return Result("mha", seed, way, heads, 10 * heads, 3.0, pruned_loss, loss, None, None, 1.0)


def test_drawn_heads() -> None:
    stays: tuple[Literal["members", "any"], ...] = ("members", "any")
    drawn = {stay: [random_election(ELECTION, stay, seed).layers for seed in range(40)] for stay in stays}
    for layers in (*drawn["members"], *drawn["any"]):
        assert [layer.labels for layer in layers] == [layer.labels for layer in LAYERS]
        for layer in layers:
            assert len(layer.kept) == 3
            assert list(layer.kept) == sorted(set(layer.kept))
    for first, second in drawn["members"]:
        assert {first.labels[head] for head in first.kept} == {0, 1}
        assert [second.labels[head] for head in second.kept] == [0, 1, 2]
        assert second.kept[0] == 0
    assert {head for first, _ in drawn["members"] for head in first.kept} == set(range(6))
    assert any([second.labels[head] for head in second.kept] != [0, 1, 2] for _, second in drawn["any"])
    assert random_election(ELECTION, "any", 3) == random_election(ELECTION, "any", 3)


def test_an_incomplete_line_does_not_count(tmp_path: Path) -> None:
    results, path = Results(tmp_path / "results.jsonl"), tmp_path / "results.jsonl"
    first, second = result(1, "plain", 3.0, 2.0), result(2, "plain", 3.0, 2.5)
    assert results.read() == []
    results.add(first)
    with path.open("a") as file:
        file.write('{"variant": "mha", "se')
    assert results.read() == [first]
    results.mend()
    results.add(second)
    assert results.read() == [first, second]


def test_summary_by_hand() -> None:
    """Differences to plain go by seed; a seed without plain counts in the mean only."""
    rows = summary(
        [
            result(1, "plain", 3.0, 2.0),
            result(2, "plain", 3.0, 2.5),
            result(1, "GHT-PS", 4.0, 2.25, heads=8),
            result(2, "GHT-PS", 5.0, 2.25, heads=8),
            result(3, "GHT-PS", 3.0, 3.0, heads=8),
        ]
    )
    plain, pruned = rows
    assert (plain["way"], plain["seeds"], plain["heads"], plain["above_plain"]) == ("plain", 2, 16, 0)
    assert (plain["loss"], plain["loss_std"]) == (pytest.approx(2.25), pytest.approx(0.125**0.5))
    assert plain["perplexity"] == pytest.approx((7.38905609893065 + 12.182493960703473) / 2)
    assert (pruned["way"], pruned["seeds"], pruned["heads"], pruned["attention_parameters"]) == ("GHT-PS", 3, 8, 80)
    assert (pruned["pruned_loss"], pruned["pruned_loss_std"]) == (pytest.approx(4), pytest.approx(1))
    assert (pruned["loss"], pruned["above_plain"]) == (pytest.approx(2.5), pytest.approx(0))
    assert pruned["above_plain_std"] == pytest.approx(0.125**0.5)
    alone = summary([result(1, "GHT", 3.0, 2.0)])[0]
    assert (alone["loss"], alone["loss_std"], alone["above_plain"]) == (2.0, None, None)


def test_done_runs_are_not_repeated_and_settings_stay(tmp_path: Path, prepared_config: object) -> None:
    from configs.schema import Config

    assert isinstance(prepared_config, Config)
    left = list(jobs(prepared_config, ["mha", "mhe_add"], 2, list(WAYS), []))
    assert len(left) == 8
    assert sorted(way for _, _, ways in left[:2] for way in ways) == sorted(WAYS)
    done = [result(1, way, 3.0, 2.0) for way in WAYS if not WAYS[way].constrained] + [result(2, "GHT", 3.0, 2.0)]
    left = list(jobs(prepared_config, ["mha"], 2, list(WAYS), done))
    assert [(config.run.seed, config.model.attention, constrained) for config, constrained, _ in left] == [
        (1, "mha", True),
        (2, "mha", False),
        (2, "mha", True),
    ]
    assert left[2][2] == ["GHT-PS", "GHT, random"]
    settle(tmp_path / "runs", prepared_config)
    settle(tmp_path / "runs", prepared_config.model_copy(update={"run": prepared_config.run.model_copy(update={"seed": 5})}))
    other = prepared_config.model_copy(update={"gha": prepared_config.gha.model_copy(update={"alpha": 0.125})})
    with pytest.raises(UserError, match=r"holds results of other settings \(gha.alpha\)"):
        settle(tmp_path / "runs", other)


@pytest.fixture
def prepared_config(prepared: Path, tmp_path: Path) -> object:
    from argparse import Namespace

    from benchmarks import gha_quality

    return gha_quality.prepared(Namespace(data=prepared, folder=tmp_path, prune_at=60), [])


def test_a_tiny_run(prepared: Path, tmp_path: Path) -> None:
    size = ["--model.hidden_size=32", "--model.num_layers=2", "--data.sequence_length=32", "--validation.samples=8"]
    short = ["--training.steps=6", "--schedule.warmup_steps=2", "--prune-at", "4", "--gha.vote_batches=2"]
    which = ["--variants", "mhe_mul", "--ways", "GHT;GHT-PS", "--seeds", "1"]
    arguments = ["--data", str(prepared), "--folder", f"{tmp_path}/runs", "--json", f"{tmp_path}/rows.json"]
    command = ["benchmarks/gha_quality.py", *which, *arguments, *size, *short]
    first = run(command)
    assert first.returncode == 0, first.stderr
    assert all(len(line) <= 100 for line in first.stdout.splitlines())
    written = json.loads((tmp_path / "rows.json").read_text())
    unpruned, pruned = sorted(written["runs"], key=lambda row: row["way"])
    # By hand: width 32, heads of 8 with biases; one projection of 3 · 8, three embeddings a head, the output; two layers.
    assert (unpruned["heads"], unpruned["attention_parameters"]) == (16, 2 * (33 * 24 + 3 * 16 * 8 + (16 * 8 + 1) * 32))
    assert (pruned["heads"], pruned["attention_parameters"]) == (8, 2 * (33 * 24 + 3 * 8 * 8 + (8 * 8 + 1) * 32))
    assert unpruned["pruned_loss"] == unpruned["unpruned_loss"] == pruned["unpruned_loss"] != pruned["pruned_loss"]
    assert len({unpruned["unpruned_loss"], unpruned["loss"], pruned["loss"]}) == 3
    kept = (tmp_path / "runs/results.jsonl").read_text()
    again = run(command)
    assert again.stdout == first.stdout
    assert "of" not in again.stderr
    assert (tmp_path / "runs/results.jsonl").read_text() == kept
