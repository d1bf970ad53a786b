"""launch/prune.py as a user meets it: a trained run, a vote's result, a smaller run that trains on with another layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from configs.load import load_config
from model.decoder import DecoderLM
from model.gha.voting import Election, LayerElection
from pretrain.grouping.election import write_election
from tests.helpers import metrics, numbers, run, train

KEPT = ((0, 5), (3, 7))
ELECTION = Election(
    step=3,
    feature_map="output",
    ballot="votes",
    ballots=4,
    heads_per_group=1,
    groups=2,
    layers=tuple(LayerElection((0, 0, 0, 0, 1, 1, 1, 1), (1.0,) * 8, kept, (1.0, 1.0)) for kept in KEPT),
)


@pytest.fixture
def voted(tmp_path: Path, finished: Path) -> Path:
    """A run's folder with a checkpoint at step 3 and the result of a vote on it."""
    folder = tmp_path / "run"
    shutil.copytree(finished.with_suffix(""), folder)
    (folder / "gha").mkdir()
    write_election(folder / "gha/election.json", ELECTION, folder / "checkpoints/step_00000003")
    return folder


def test_a_pruned_run_trains_on(voted: Path) -> None:
    result = run(["launch/prune.py", str(voted)], "python")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    configs = [load_config(folder / "config.yaml").model for folder in (voted, voted / "pruned")]
    assert [config.num_heads for config in configs] == [8, 2]
    models = [dict(DecoderLM(config).named_parameters()) for config in configs]
    whole, left = ({name: parameter.numel() for name, parameter in model.items()} for model in models)
    expected = {
        "heads": (8, 2),
        "attention": tuple(sum(size for name, size in sizes.items() if ".attention." in name) for sizes in (whole, left)),
        "model": (sum(whole.values()), sum(left.values())),
        "token": (32, 32),  # mhe_add keeps one key and one value of width 4 in each of two layers, whatever its heads
    }
    for line, (name, (before, after)) in zip(lines[1:5], expected.items(), strict=True):
        assert name in line
        assert line[-3:] == [f"{before:,}", f"{after:,}", f"{1 - after / before:.1%}"]
    assert f"--config {voted}/pruned/config.yaml --resume=auto --training.steps=N (above 3)" in result.stdout
    exported = run(["launch/export.py", str(voted / "pruned"), str(voted / "exported")])
    assert exported.returncode == 0, exported.stderr
    assert "stock, gpt_bigcode, 2 heads on 1 of keys and values, filled up with zeros to 4" in exported.stdout
    figures = run(["launch/evaluate.py", str(voted / "pruned")])
    assert figures.returncode == 0, figures.stderr
    train(
        voted / "pruned/config.yaml",
        "--resume=auto",
        "--training.steps=6",
        "--parallel.zero_stage=3",
        f"--run.folder={voted}/pruned",
        processes=2,
    )
    losses = numbers(metrics(voted / "pruned"), "step", "loss")
    assert [step for step, _ in losses] == [4, 5, 6]
    assert all(loss < 6 for _, loss in losses)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "--election", "{nowhere}"], "nowhere: does not exist; a vote writes it"),
        (["{nowhere}"], "nowhere: no such checkpoint folder"),
        (["{run}", "--tensor", "3"], "parallel.tensor = 3: must divide num_heads (2)"),
        (
            ["{run}/checkpoints/step_00000003", "--output", "{run}"],
            "run: holds a run already, at step 3; resume it with --config",
        ),
    ],
)
def test_a_users_mistake_is_one_clear_error(voted: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = run(["launch/prune.py", *(text.format(run=voted, nowhere=tmp_path / "nowhere") for text in arguments)])
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (voted / "pruned").exists()
