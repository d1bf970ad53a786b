"""From a checkpoint and an election to a smaller run: what is written, what is refused, what a full disk or a kill leaves."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from model.build import unsharded_shapes
from model.decoder import DecoderLM
from model.faults import model_faults
from model.gha.faults import gha_faults
from model.gha.voting import Election, LayerElection
from model.initialization import init_weights
from model.parallel.faults import tensor_faults
from pretrain.checkpoints.folder import TrainState, read_config, read_state, verify
from pretrain.checkpoints.state import State
from pretrain.checkpoints.store import CheckpointStore
from pretrain.checkpoints.unsharded import load_state, load_weights
from pretrain.grouping.election import write_election
from pretrain.grouping.origin import read_origin
from pretrain.grouping.prune import figures, prune, prune_run
from pretrain.grouping.report.page import write_report
from tests.helpers import write_run
from tests.random_checkpoint import write_checkpoint

KINDS = ("model", "exp_avg", "exp_avg_sq")
KEPT = ((0, 1, 4, 7), (2, 3, 5, 6))
ELECTION = Election(
    step=3,
    feature_map="value",
    ballot="votes",
    ballots=5,
    heads_per_group=2,
    groups=2,
    layers=tuple(LayerElection((0, 0, 0, 0, 1, 1, 1, 1), (1.0,) * 8, kept, (1.0, 1.0)) for kept in KEPT),
)


def config_of(folder: Path, *overrides: str, world_size: int = 1) -> Config:
    return load_config(write_run(folder, folder / "data"), overrides, world_size=world_size).resolved(300)


def written(folder: Path, *overrides: str, world_size: int = 1) -> Path:
    """A checkpoint at step 3 of a run whose gha.stage is vote."""
    config = config_of(
        folder, "--gha.stage=vote", "--gha.groups=2", "--gha.heads_per_group=2", *overrides, world_size=world_size
    )
    generator = torch.Generator().manual_seed(3)
    shapes = unsharded_shapes(config.model)
    tensors = {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in KINDS}
    return write_checkpoint(config, tensors, TrainState(3, world_size, "d" * 64))


def test_the_pruned_run_stands_where_the_other_stood(tmp_path: Path) -> None:
    checkpoint, output = written(tmp_path), tmp_path / "run/pruned"
    folder = prune(checkpoint, ELECTION, output)
    assert folder == output / "checkpoints/step_00000003"
    verify(folder)
    before, after = read_config(checkpoint), read_config(folder)
    checks = [model_faults, gha_faults, tensor_faults]
    assert after == load_config(output / "config.yaml", checks=checks)
    assert after == before.model_copy(
        update={
            "run": before.run.model_copy(update={"folder": str(output)}),
            "model": before.model.model_copy(update={"num_heads": 4}),
            "gha": before.gha.model_copy(update={"stage": "off"}),
        }
    )
    assert after.model.head_dim == 4
    assert read_state(folder) == read_state(checkpoint)


def test_the_report_of_the_vote_says_that_the_heads_are_pruned(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    page = write_report(tmp_path / "run", ELECTION, torch.eye(8).double().expand(2, 8, 8), read_config(checkpoint))
    assert "launch/prune.py" in page.read_text()
    prune(checkpoint, ELECTION, tmp_path / "elsewhere")
    assert "launch/prune.py" not in page.read_text()
    assert f"--config {tmp_path}/elsewhere/config.yaml --resume=auto" in page.read_text()
    assert read_origin(tmp_path / "elsewhere") == (tmp_path / "run", 3)


def test_a_report_that_cannot_be_written_stops_no_pruning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = written(tmp_path)
    (tmp_path / "run/gha/report.html").mkdir(parents=True)
    verify(prune(checkpoint, ELECTION, tmp_path / "out"))
    warning = f"warning: {tmp_path}/run/gha/report.html: cannot be brought up to date (Is a directory)\n"
    assert capsys.readouterr().err == warning


def test_weights_and_moments_of_the_heads_that_stay_are_the_old_ones(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    states = load_state(prune(checkpoint, ELECTION, tmp_path / "out")), load_state(checkpoint)
    assert [float(state.scalars["step"][0]) for state in states] == [3, 3]
    found, before = (state.by_kind() for state in states)
    for kind in KINDS:
        for layer, kept in enumerate(KEPT):
            prefix = f"blocks.{layer}.attention"
            old, new = before[kind], found[kind]
            assert torch.equal(new[f"{prefix}.value_embedding"], old[f"{prefix}.value_embedding"][list(kept)])
            columns_HND = old[f"{prefix}.out.weight"].view(16, 8, 4)
            assert torch.equal(new[f"{prefix}.out.weight"].view(16, 4, 4), columns_HND[:, list(kept)])
            assert torch.equal(new[f"{prefix}.qkv.weight"], old[f"{prefix}.qkv.weight"])
        assert torch.equal(found[kind]["token_embedding.weight"], before[kind]["token_embedding.weight"])


@pytest.mark.parametrize(("average", "kinds"), [("decay=0.9", ["average"]), ("last=3", ["saved_1", "saved_2"])])
def test_averages_are_pruned_as_weights_are(tmp_path: Path, average: str, kinds: list[str]) -> None:
    config = config_of(tmp_path, f"--training.average.{average}", "--checkpoint.every_steps=1")
    generator, shapes = torch.Generator().manual_seed(4), unsharded_shapes(config.model)
    tensors = {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in (*KINDS, *kinds)
    }
    state = State.unsharded(tensors, {"step": torch.tensor(3.0), "average_steps": torch.tensor(2.0)})
    checkpoint = CheckpointStore(tmp_path / "run").save_alone(config, TrainState(3, 1, "d" * 64), "{}", state)
    folder = prune(checkpoint, ELECTION, tmp_path / "out")
    assert read_state(folder) == read_state(checkpoint)
    trained, found = load_weights(folder), load_weights(folder, "average")
    before = load_weights(checkpoint, "average")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in trained.items()}
    for layer, kept in enumerate(KEPT):
        name = f"blocks.{layer}.attention.value_embedding"
        assert torch.equal(found[name], before[name][list(kept)])


def test_figures_are_those_of_real_models(tmp_path: Path) -> None:
    for attention in ("mha", "mhe_add"):
        before = config_of(tmp_path, f"--model.attention={attention}").model
        after = before.model_copy(update={"num_heads": 2})
        models = [DecoderLM(config) for config in (before, after)]
        for model in models:
            init_weights(model, seed=1)
        attentions = [sum(p.numel() for name, p in m.named_parameters() if ".attention." in name) for m in models]
        caches = [m.new_cache(1, 1) for m in models]
        with torch.no_grad():
            for model, cache in zip(models, caches, strict=True):
                model.logits(torch.tensor([[1]]), cache=cache)
        of_token = [sum(2 * 2 * layer.k_BKSD.shape[1] * 4 for layer in cache.layers) for cache in caches]
        assert figures(before, after) == [
            ("heads of a layer", 8, 2),
            ("parameters, attention", *attentions),
            ("parameters, model", *(sum(p.numel() for p in m.parameters()) for m in models)),
            ("KV cache, bytes of a token", *of_token),  # keys and values of 2 bytes, width 4
        ]


def test_another_number_of_tensor_parallel_ranks(tmp_path: Path) -> None:
    """Three heads stay, which no longer fit two ranks; as many data-parallel ranks as before go on."""
    checkpoint = written(tmp_path, "--model.num_heads=6", "--parallel.tensor=2", "--gha.heads_per_group=1", world_size=4)
    layers = tuple(LayerElection((0, 1, 2, 0, 1, 2), (1.0,) * 6, (0, 1, 2), (1.0,) * 3) for _ in KEPT)
    election = replace(ELECTION, groups=3, heads_per_group=1, layers=layers)
    with pytest.raises(
        UserError, match=r"parallel\.tensor = 2: must divide num_heads \(3\).* with other gha\.groups.*--tensor"
    ):
        prune(checkpoint, election, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = prune(checkpoint, election, tmp_path / "out", tensor=1)
    assert read_config(folder).parallel.tensor == 1
    assert read_state(folder).world_size == 2


def test_votes_that_would_fit_are_named(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, "--parallel.tensor=4", "--gha.heads_per_group=1", world_size=4)
    layers = tuple(LayerElection((0, 0, 0, 0, 1, 1, 1, 1), (1.0,) * 8, (0, 4), (1.0,) * 2) for _ in KEPT)
    with pytest.raises(UserError, match=r"a vote with gha\.heads_per_group 2 leaves heads for parallel\.tensor 4"):
        prune(checkpoint, replace(ELECTION, heads_per_group=1, layers=layers), tmp_path / "out")


def of_heads(heads: int) -> tuple[LayerElection, ...]:
    return tuple(LayerElection((0, 1) * (heads // 2), (1.0,) * heads, (0, 1, 2, 3), (1.0, 1.0)) for _ in KEPT)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": 4}, "has step 3, the election 4: it belongs to another checkpoint"),
        ({"layers": ELECTION.layers * 2}, "has num_layers 2, the election 4"),
        ({"layers": of_heads(10)}, "has num_heads 8, the election 10"),
    ],
)
def test_elections_of_other_models_are_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    checkpoint = written(tmp_path)
    with pytest.raises(UserError, match=expected):
        prune(checkpoint, replace(ELECTION, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    with pytest.raises(UserError, match=r"run: holds a run already, at step 3; resume it with --config .*run/config\.yaml"):
        prune(checkpoint, ELECTION, checkpoint.parent.parent)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").touch()
    with pytest.raises(UserError, match=r"notes: is not empty \(a\.txt\)"):
        prune(checkpoint, ELECTION, tmp_path / "notes")
    with pytest.raises(UserError, match=r"a\.txt: cannot be used as a folder"):
        prune(checkpoint, ELECTION, tmp_path / "notes/a.txt")


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    checkpoint, output = written(tmp_path), tmp_path / "out"
    (output / "checkpoints/.step_00000003.partial/engine").mkdir(parents=True)
    (output / "config.yaml").write_text("half")
    verify(prune(checkpoint, ELECTION, output))


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    checkpoint, output = written(tmp_path), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"out/checkpoints/step_00000003: the checkpoint could not be saved .*too large"):
            prune(checkpoint, ELECTION, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((output / "checkpoints").iterdir()) == []
    verify(prune(checkpoint, ELECTION, output))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    path = checkpoint / "engine/rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"rank_00000\.safetensors: its content is not what was written"):
        prune(checkpoint, ELECTION, tmp_path / "out")


@pytest.mark.parametrize("name", [lambda checkpoint: checkpoint, lambda checkpoint: checkpoint.parent.parent])
def test_a_run_or_a_checkpoint_with_the_runs_election(tmp_path: Path, name: Callable[[Path], Path]) -> None:
    checkpoint = written(tmp_path)
    run = checkpoint.parent.parent
    (run / "gha").mkdir()
    write_election(run / "gha/election.json", ELECTION, checkpoint)
    shutil.copytree(checkpoint, run / "checkpoints/step_00000009")  # trained on after the vote
    before, after = prune_run(name(checkpoint), None, None, None)
    assert before == checkpoint
    assert after == run / "pruned/checkpoints/step_00000003"


def test_the_election_of_another_run_of_the_same_step_and_shape(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    checkpoint, other = (written(tmp_path / name) for name in ("one", "other"))
    assert read_state(checkpoint) == read_state(other)
    write_election(tmp_path / "e.json", ELECTION, other)
    with pytest.raises(
        UserError, match=r"one/run/.*: the election belongs to another checkpoint, .*other/run/checkpoints/step_0"
    ):
        prune_run(checkpoint, tmp_path / "e.json", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    prune_run(other, tmp_path / "e.json", tmp_path / "out", None)


def test_a_run_without_the_checkpoint_that_was_voted_on(tmp_path: Path) -> None:
    checkpoint = written(tmp_path)
    write_election(tmp_path / "e.json", replace(ELECTION, step=2), checkpoint)
    with pytest.raises(
        UserError, match=r"step_00000002: does not exist, but the election is of step 2; the newest is .*step_00000003"
    ):
        prune_run(checkpoint.parent.parent, tmp_path / "e.json", None, None)
    with pytest.raises(UserError, match=r"gha/election\.json: does not exist; a vote writes it"):
        prune_run(checkpoint.parent.parent, None, None, None)
