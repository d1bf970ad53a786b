"""Which steps are skipped, against NumPy; what is written of them; the end after too many; the state in checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from pretrain.backends.base import StepResult
from pretrain.distributed.layout import Layout
from pretrain.loop.skipping import FILE, Skipping
from pretrain.loop.trainer import Trainer
from tests.helpers import metrics, write_run
from tests.unit.pretrain.loop.engine import Loop, Noted

NAN, GOOD = StepResult(math.nan, math.nan), StepResult(1.0, 1.0)


def figures(steps: int, seed: int = 0) -> np.ndarray:
    """Loss and norm of each step: they fall, with noise and spikes of all sizes, up and down; some are not finite."""
    draw = np.random.default_rng(seed)
    values = 3 + np.exp(-np.arange(steps) / 100)[:, None] + 0.1 * draw.standard_normal((steps, 2))
    at = draw.choice(steps, (2, steps // 6))
    for column in (0, 1):
        values[at[column], column] += draw.uniform(-2, 2, at.shape[1])
    values[draw.choice(np.arange(steps), 5), draw.integers(0, 2, 5)] = (np.nan, np.inf, -np.inf, np.nan, np.inf)
    values[~np.isfinite(values).all(1), 1] = np.inf  # engines see to it
    return values


def expected_decisions(values: np.ndarray, sigma: float) -> list[bool]:
    """By NumPy, from all finite rows before: True is skipped."""
    found = []
    for step, row in enumerate(values):
        if not np.isfinite(row).all():
            found.append(True)
            continue
        before = values[:step]
        last = before[np.isfinite(before).all(1)][-128:]
        found.append(len(last) >= 64 and bool((row > last.mean(0) + sigma * last.std(0, ddof=1)).any()))
    return found


def skipping(tmp_path: Path, *overrides: str) -> Skipping:
    config: Config = load_config(write_run(tmp_path, tmp_path / "data"), overrides)
    return Skipping(config, Layout())


@pytest.mark.parametrize("sigma", [2.0, 4.0])
def test_spikes_are_those_of_numpy(tmp_path: Path, sigma: float) -> None:
    values = figures(500)
    decides = skipping(tmp_path, f"--training.skip.spike_sigma={sigma}")
    found = [not decides.accepts(norm, lambda loss=loss: loss) for loss, norm in values.tolist()]  # type: ignore[misc]
    expected = expected_decisions(values, sigma)
    assert found == expected
    assert sum(expected) > 5 + 2  # some for spikes
    assert not all(expected)


def test_a_level_that_stays_high_is_accepted_in_the_end(tmp_path: Path) -> None:
    decides = skipping(tmp_path, "--training.skip.spike_sigma=6")
    noise = np.random.default_rng(1).standard_normal(300) * 0.01
    found = [not decides.accepts(1.0, lambda loss=loss: loss) for loss in (2 + noise).tolist()]  # type: ignore[misc]
    assert not any(found)
    found = [not decides.accepts(1.0, lambda loss=loss: loss) for loss in (4 + noise).tolist()]  # type: ignore[misc]
    assert found[0]
    assert 1 < sum(found) < 10
    assert not any(found[10:])


def test_the_loss_is_not_read_where_no_spikes_are_watched(tmp_path: Path) -> None:
    decides = skipping(tmp_path)

    def loss() -> float:
        raise AssertionError

    assert decides.accepts(1e9, loss)
    assert not decides.accepts(math.inf, loss)


def test_a_skipped_step_is_counted_with_its_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of 8 with the samples 10 to 13 left out."""
    results = [GOOD, NAN, GOOD, StepResult(1.5, math.inf)]
    loop = Loop(tmp_path, "--training.steps=4", "--training.skip_samples=[[10, 14]]", results=results)
    loop.trainer.run()
    lines = [line for line in metrics(tmp_path / "run") if "skipped" in line]
    assert lines == [
        {"step": 2, "skipped": 1, "skipped_for": "not finite", "skipped_samples": [[8, 10], [14, 20]]},
        {"step": 4, "skipped": 2, "skipped_for": "not finite", "skipped_samples": [[28, 36]]},
    ]
    others = [line for line in metrics(tmp_path / "run") if "learning_rate" in line]
    assert [line["step"] for line in others] == [1, 2, 3, 4]  # the rate goes on
    assert [line.get("loss") for line in others] == [1.0, None, 1.0, 1.5]
    said = capsys.readouterr().out
    assert "step 2: skipped, not finite: loss nan, gradient norm nan; samples [[8, 10], [14, 20]]\n" in said
    assert "step 4: skipped, not finite: loss 1.5, gradient norm inf; samples [[28, 36]]\n" in said


def test_a_spike_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [StepResult(2 + step % 2, 1 + step % 2) for step in range(64)]
    results += [StepResult(9.0, 1.0), StepResult(2.0, 9.0), StepResult(50.0, 50.0)]
    loop = Loop(tmp_path, "--training.steps=67", "--training.skip.spike_sigma=5", results=results)
    loop.trainer.run()
    lines = [line for line in metrics(tmp_path / "run") if "skipped" in line]
    assert [(line["step"], line["skipped_for"]) for line in lines] == [
        (65, "loss"),
        (66, "gradient norm"),
        (67, "loss and gradient norm"),
    ]
    assert "step 65: skipped, a spike of the loss: loss 9, gradient norm 1; samples [[512, 520]]\n" in capsys.readouterr().out


def test_other_hooks_see_that_a_step_was_skipped(tmp_path: Path) -> None:
    seen: list[bool] = []
    hook = Noted("hook", [], lambda trainer: seen.append(trainer.last.skipped))
    Loop(tmp_path, "--training.steps=3", results=[GOOD, NAN, GOOD], hooks=[hook]).trainer.run()
    assert seen == [False, True, False]


@pytest.mark.parametrize(
    ("limit", "results", "ends_at"),
    [
        (0, [GOOD, NAN], 2),
        (1, [NAN, GOOD, NAN, NAN], 4),
        (2, [NAN, NAN, GOOD, NAN, NAN, NAN], 6),
        (2, [NAN, NAN, GOOD, NAN, NAN, GOOD], None),
        (10, [NAN] * 6, None),
    ],
)
def test_so_many_in_a_row_are_skipped_and_no_more(
    tmp_path: Path, limit: int, results: list[StepResult], ends_at: int | None
) -> None:
    loop = Loop(tmp_path, f"--training.skip.nonfinite={limit}", results=results, hooks=[noted := Noted("hook", [])])
    if ends_at is None:
        loop.trainer.run()
        return
    row = f", not finite in {limit + 1} steps in a row" if limit else ""
    samples = f"[[{8 * (ends_at - limit - 1)}, {8 * ends_at}]]"
    message = (
        f"step {ends_at}: loss nan, gradient norm nan{row}: training diverged; start anew in another --run.folder with a lower "
        f"optimizer.lr or a longer schedule.warmup_steps, or leave out the samples of these steps, {samples}: start anew in "
        f"another --run.folder with --training.skip_samples='{samples}'"
    )
    with pytest.raises(UserError) as error:
        loop.trainer.run()
    assert str(error.value) == message
    assert noted.events == [("hook", step) for step in range(1, ends_at)]  # none is saved of this step
    assert metrics(tmp_path / "run")[-1]["skipped_samples"] == [[8 * ends_at - 8, 8 * ends_at]]


def test_the_samples_to_leave_out_come_with_those_that_are_left_out(tmp_path: Path) -> None:
    overrides = ("--training.skip.nonfinite=0", "--training.skip_samples=[[40, 50], [2, 4]]")
    with pytest.raises(UserError, match=r"--training\.skip_samples='\[\[2, 4\], \[10, 18\], \[40, 50\]\]'$"):
        Loop(tmp_path, *overrides, results=[GOOD, NAN]).trainer.run()


def test_an_engine_that_takes_a_step_with_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^step 2: loss inf, gradient norm 1\.0: training diverged; "):
        Loop(tmp_path, results=[GOOD, StepResult(math.inf, 1.0)]).trainer.run()


def trained(loop: Loop, steps: int) -> Trainer:
    for _ in range(steps):
        loop.trainer.advance()
    return loop.trainer


def test_an_interrupted_run_decides_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Interrupted after each step in turn: window, counts and the row of steps that are not finite."""
    values = figures(90, seed=3)
    results = [StepResult(*row) for row in values.tolist()]
    results[70:73] = [NAN, NAN, NAN]
    overrides = ("--training.steps=90", "--training.skip.spike_sigma=1.5")
    whole = trained(Loop(tmp_path, *overrides, results=results), 90)
    lines = [line for line in metrics(tmp_path / "run") if "skipped" in line]
    assert len(lines) > 8
    for at in (1, 66, 71, 72, 89):
        (folder := tmp_path / str(at)).mkdir()
        assert trained(Loop(folder, *overrides, results=results), at).skipping.save(folder) == [folder / FILE]
        second = Loop(folder, *overrides, results=results[at:], first_step=at)
        second.trainer.skipping.load(folder)
        trained(second, 90 - at)
        assert [line for line in metrics(folder / "run") if "skipped" in line] == lines
        assert vars(second.trainer.skipping)["losses"] == whole.skipping.losses
        assert second.trainer.skipping.grad_norms == whole.skipping.grad_norms


def test_the_row_goes_on_after_a_restart(tmp_path: Path) -> None:
    first = skipping(tmp_path)
    first.in_a_row, first.skipped = 2, 7
    first.save(tmp_path)
    loop = Loop(tmp_path, "--training.skip.nonfinite=2", results=[NAN], first_step=4)
    loop.trainer.skipping.load(tmp_path)
    with pytest.raises(UserError, match=r"^step 5: .*not finite in 3 steps in a row.*skip_samples='\[\[16, 40\]\]'$"):
        loop.trainer.run()


def test_what_was_watched_before_a_run_without_watching_is_forgotten(tmp_path: Path) -> None:
    watching = skipping(tmp_path, "--training.skip.spike_sigma=3")
    watching.accepts(1.0, lambda: 2.0)
    watching.save(tmp_path)
    plain = skipping(tmp_path)
    plain.load(tmp_path)
    assert len(plain.losses) == 0


@pytest.mark.parametrize(
    "text", ["", "[]", '{"skipped": 1}', '{"skipped": 1, "in_a_row": 0, "losses": ["a"], "grad_norms": []}']
)
def test_a_damaged_state_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{FILE}: is damaged"):
        skipping(tmp_path).load(tmp_path)


def test_a_checkpoint_of_a_run_without_skipping_is_fine(tmp_path: Path) -> None:
    assert skipping(tmp_path).load(tmp_path) is None


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, tmp_path / "data"), world_size=2)
    assert Skipping(config, Layout(1, 2, 1, 2)).save(tmp_path) == []


def test_every_bit_of_the_window_is_kept(tmp_path: Path) -> None:
    first = skipping(tmp_path, "--training.skip.spike_sigma=3")
    values = torch.rand(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    for loss, norm in values:
        first.accepts(norm / 3, lambda loss=loss: loss / 7)  # type: ignore[misc]
    first.save(tmp_path)
    json.loads((tmp_path / FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    second = skipping(tmp_path, "--training.skip.spike_sigma=3")
    second.load(tmp_path)
    assert (list(second.losses), list(second.grad_norms)) == (list(first.losses), list(first.grad_norms))
    assert len(second.losses) == 64
