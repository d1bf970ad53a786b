"""From groups to a smaller model in one run: the same election and losses on every layout, and wherever it is interrupted."""

from __future__ import annotations

import shlex
import signal
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from pretrain.checkpoints.folder import newest_checkpoint, read_config
from pretrain.checkpoints.unsharded import load_weights
from pretrain.grouping.election import read_election
from tests.helpers import free_port, launched_as, metrics, named, numbers, run_ranks, write_run

if TYPE_CHECKING:
    from tests.helpers import Opener


SETTINGS = (
    "--model.num_layers=2",
    "--model.head_dim=null",
    "--model.init_std=0.2",
    "--optimizer.lr=3e-4",
    "--training.steps=10",
    "--schedule.warmup_steps=2",
    "--validation.every_steps=0",
    "--checkpoint.every_steps=4",
    "--checkpoint.keep_last=3",
    "--gha.stage=schedule",
    "--gha.groups=4",
    "--gha.vote_at_step=7",
    "--gha.vote_batches=5",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "ZeRO 2 × 2": (2, ("--parallel.zero_stage=2",)),
    "PP 2": (2, ("--parallel.pipeline=2",)),
    "TP 2": (2, ("--parallel.tensor=2",)),
    "FSDP 2": (2, ("--backend=fsdp",)),
}


class Unwatched:
    """In the place of the watchdog, which needs a launcher."""

    def moved(self, *_: object) -> None:
        pass

    reached = moved


def run_here(opened: Opener, path: Path, overrides: tuple[str, ...], resume: str, stop: str = "") -> int | None:
    """The whole of `pretrain` in a rank of a launched group.

    `stop`: in "step" (the first), "vote" (the first ballot) or "cut" (when the heads are cut) comes a SIGTERM.
    """
    from pretrain import run
    from pretrain.grouping import vote
    from pretrain.loop.interruption import Interruption

    config = load_config(path, [*SETTINGS, *overrides])
    interruption = Interruption()
    with pytest.MonkeyPatch.context() as patch, opened(config.parallel) as layout:

        def stopping(module: Any, name: str, when: bool) -> None:
            original = getattr(module, name)

            def call(*arguments: Any, **options: Any) -> Any:
                result = original(*arguments, **options)
                if when:
                    interruption.signal = signal.SIGTERM
                return result

            patch.setattr(module, name, call)

        stopping(vote.HeadGrouping, "regroup", stop.startswith("step"))
        stopping(vote.Ballots, "add", stop == "vote")
        stopping(run, "prune", stop == "cut")
        return run._stages(config, resume, run.Session(layout, interruption, Unwatched()))  # type: ignore[arg-type]


def whole_schedules(rank: int, ranks: int, port: int, path: Path) -> None:
    with launched_as(rank, ranks, port) as opened:
        for layout, (size, settings) in LAYOUTS.items():
            if size == ranks:
                assert run_here(opened, path, (*settings, f"--run.folder={path.parent}/{layout}"), "none") is None


def in_parts(rank: int, ranks: int, port: int, path: Path) -> None:
    with launched_as(rank, ranks, port) as opened:
        overrides = (*LAYOUTS["ZeRO 2 × 2"][1], f"--run.folder={path.parent}/parts")
        assert run_here(opened, path, overrides, "none", "step") == signal.SIGTERM
        assert run_here(opened, path, overrides, "auto", "vote") == signal.SIGTERM
        assert run_here(opened, path, overrides, "auto", "vote") == signal.SIGTERM
        assert run_here(opened, path, overrides, "auto", "cut") == signal.SIGTERM
        assert run_here(opened, path, overrides, "auto") is None
        for name, value, was in (("gha.alpha", "0.5", "0.03"), ("gha.end_step", "3", "null"), ("model.num_heads", "16", "8")):
            with pytest.raises(
                UserError, match=rf"{name} = {value}: the heads of .*/pruned were chosen with {was}; put it back"
            ):
                run_here(opened, path, (*overrides, f"--{name}={value}"), "auto")
        of_parts = f"{path.parent}/parts"
        assert run_here(opened, path, (*overrides[:-1], f"--run.folder={path.parent}/late"), of_parts) is None
        vote = (*overrides[:-1], "--gha.stage=vote", "--gha.vote_at_step=null")
        with pytest.raises(UserError, match="holds no checkpoint to vote on"):
            run_here(opened, path, (*vote, f"--run.folder={path.parent}/empty"), "auto")
        with pytest.raises(UserError, match=r"heads_per_group = 2: times 4 groups must be below model.num_heads \(8\)"):
            run_here(
                opened,
                path,
                (*vote, f"--run.folder={of_parts}", "--gha.groups=null", "--gha.max_groups=2", "--gha.heads_per_group=2"),
                "auto",
            )
        assert (
            run_here(opened, path, (*vote, f"--run.folder={path.parent}/attention", "--gha.feature_map=attention"), of_parts)
            is None
        )


def losses(run: Path) -> torch.Tensor:
    return torch.tensor(numbers(metrics(run), "step", "loss", "grad_norm"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A folder with the whole schedules of all layouts."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_run(folder, prepared)
    for ranks in (1, 2):
        run_ranks(whole_schedules, ranks, ranks, free_port(), config, seconds=200)
    return folder


@pytest.mark.timeout(300)
def test_election_and_losses_are_those_of_one_process(whole: Path) -> None:
    expected = whole / "one process"
    assert [int(step) for step, *_ in losses(expected)] == list(range(1, 8))
    assert [int(step) for step, *_ in losses(expected / "pruned")] == list(range(8, 11))
    election = read_election(expected / "gha/election.json").election
    assert election.ballots == 5
    for layout in LAYOUTS:
        assert read_election(whole / layout / "gha/election.json").election == election, layout
        assert (whole / layout / "gha/report.html").stat().st_size > 10_000
        for part in (".", "pruned"):
            found, wanted = losses(whole / layout / part), losses(expected / part)
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=0, msg=named(f"{layout}, {part}"))
    last = newest_checkpoint(expected / "pruned")
    assert read_config(last).model.num_heads == 4
    assert read_config(last).gha.stage == "off"
    assert load_weights(last)["blocks.0.attention.out.weight"].shape[1] == 4 * read_config(last).model.head_width
    for layout in LAYOUTS:
        check_report(whole / layout)


def check_report(run: Path) -> None:
    """Its losses are those of the metrics, and those of both checkpoints of the vote's step without an engine."""
    from pretrain.inference import evaluate_checkpoint

    validations = [numbers(metrics(folder), "step", "validation/loss") for folder in (run, run / "pruned")]
    assert [[step for step, _ in of_run] for of_run in validations] == [[7], [7, 10]], run
    before, after, end = (loss for of_run in validations for _, loss in of_run)
    for folder, loss in ((run, before), (run / "pruned", after)):
        alone = evaluate_checkpoint(folder / "checkpoints/step_00000007", None, "valid", 5, 5)
        assert loss == pytest.approx(alone["loss"], rel=2e-5), folder
    page = (run / "gha/report.html").read_text()
    assert all(f"<td>{loss:.4f}</td>" in page for loss in (before, after, end)), run
    assert f"launch/export.py {shlex.quote(f'{run}/pruned')} exported" in unescape(page)


@pytest.mark.timeout(300)
def test_a_schedule_goes_on_wherever_it_stopped(whole: Path, tmp_path: Path, prepared: Path) -> None:
    run_ranks(in_parts, 2, 2, free_port(), write_run(tmp_path, prepared), seconds=200)
    at_once, parts = whole / "ZeRO 2 × 2", tmp_path / "parts"
    late, here, there = (read_election(run / "gha/election.json") for run in (tmp_path / "late", parts, at_once))
    assert here.election == there.election == late.election
    assert len({election.checkpoint_sha256 for election in (here, there, late)}) == 3  # of runs in other folders
    for part in (".", "pruned"):
        assert torch.equal(losses(parts / part), losses(at_once / part)), part
        one, other = (numbers(metrics(run / part), "step", "validation/loss") for run in (parts, at_once))
        assert one == other, part  # measured once, however often the vote and the pruned run started
    # A schedule whose vote is due where another run's checkpoint stands; and a vote on other maps than the groups were of.
    assert torch.equal(losses(tmp_path / "late/pruned"), losses(at_once / "pruned"))
    by_attention, by_value = (read_election(run / "gha/election.json").election for run in (tmp_path / "attention", at_once))
    assert by_attention.feature_map == "attention"
    assert by_attention.layers[0].labels != by_value.layers[0].labels
    once, often = (load_weights(newest_checkpoint(run / "pruned")) for run in (at_once, parts))
    assert all(torch.equal(once[name], often[name]) for name in once)
