"""When validation and checkpoints happen, with steps that end in every way."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from data_pipeline.read.sets import UNNAMED
from pretrain.backends.base import StepResult
from pretrain.checkpoints.state import NotFiniteError
from pretrain.loop.hooks import Checkpoints, Validation
from pretrain.objectives.base import WeightedSum
from tests.helpers import metrics, numbers
from tests.unit.pretrain.loop.engine import ONE_STEP, Held, Loop, Saves

STEPS = "--training.steps=5"
BYTES = 0.5  # of text, for each nat of an unweighted loss


def validation(every_steps: int, held: Held, **others: Held) -> Validation:
    """Of one set without a name, or of `others`."""
    sets: Any = others or {UNNAMED: held}
    return Validation(sets, every_steps, lambda batch: float(batch.labels.sum()) * BYTES)


def validated(folder: Path) -> list[float]:
    """The steps that have a validation loss."""
    return [step for step, _ in numbers(metrics(folder / "run"), "step", "validation/loss")]


@pytest.mark.parametrize(("every_steps", "expected"), [(2, [2, 4, 5]), (5, [5]), (0, [5]), (1, [1, 2, 3, 4, 5]), (7, [5])])
def test_validation_every_n_steps_and_after_the_last(tmp_path: Path, every_steps: int, expected: list[int]) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[validation(every_steps, Held([[1]]))])
    loop.trainer.run()
    assert validated(tmp_path) == expected
    assert loop.events.count("evaluate") == len(expected)


def test_validation_reports_the_weighted_mean_and_its_exponential(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Held([[1, 3], [5, 9]], weights=[[1.0, 0.5], [0.5, 0.0]])
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, held)]).trainer.run()
    line = metrics(tmp_path / "run")[-1]
    bits = 5 / math.log(2) / 9  # 5 nats; labels that sum up to 18
    assert line == {
        "step": 1,
        "validation/loss": 2.5,
        "validation/perplexity": pytest.approx(math.exp(2.5)),
        "validation/bits_per_byte": pytest.approx(bits),
        "validation/samples": 2,
    }
    expected = f"step 1: validation loss 2.5000, perplexity 12.18, {bits:.4f} bits per byte"
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_each_set_has_its_figures_and_their_mean_stands_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four labels of wiki, two of code: a mean over labels would be 3.0."""
    sets = {"wiki": Held([[1, 3], [5, 3]]), "code": Held([[1, 3]])}
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, sets["wiki"], **sets)]).trainer.run()
    bits = 1 / math.log(2) / BYTES  # a byte for every two nats, in both
    expected = {"wiki": (3.0, 2), "code": (2.0, 1)}
    of_sets = {
        f"validation/{name}/{figure}": value
        for name, (loss, samples) in expected.items()
        for figure, value in figures(loss, bits, samples).items()
    }
    mean = {f"validation/{figure}": value for figure, value in figures(2.5, bits, 3).items()}
    assert metrics(tmp_path / "run")[-1] == {"step": 1, **of_sets, **mean}
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"step 1: validation of wiki: loss 3.0000, perplexity 20.09, {bits:.4f} bits per byte",
        f"step 1: validation of code: loss 2.0000, perplexity 7.39, {bits:.4f} bits per byte",
        f"step 1: validation loss 2.5000, perplexity 12.18, {bits:.4f} bits per byte; the mean of 2 sets",
    ]


def figures(loss: float, bits: float, samples: int) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": pytest.approx(math.exp(loss)),
        "bits_per_byte": pytest.approx(bits),
        "samples": samples,
    }


def test_a_set_alone_is_said_once_and_written_under_both_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = Held([[1, 3]])
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, held, code=held)]).trainer.run()
    line = metrics(tmp_path / "run")[-1]
    assert line["validation/loss"] == line["validation/code/loss"] == 2
    assert [text for text in capsys.readouterr().out.splitlines() if "validation" in text] == [
        f"step 1: validation of code: loss 2.0000, perplexity 7.39, {1 / math.log(2) / BYTES:.4f} bits per byte"
    ]


def test_a_set_whose_text_has_no_bytes_leaves_no_mean_of_bits(tmp_path: Path) -> None:
    held = Held([[1, 3]])
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, held, code=held, ends=Held([[0, 0]]))]).trainer.run()
    line = metrics(tmp_path / "run")[-1]
    assert "validation/code/bits_per_byte" in line
    assert not {"validation/ends/bits_per_byte", "validation/bits_per_byte"} & set(line)
    assert line["validation/loss"] == 1


def test_a_signal_in_the_second_set_leaves_no_figures_of_the_first(tmp_path: Path) -> None:
    held = Held([[1]])
    loop = Loop(tmp_path, STEPS, hooks=[validation(1, held, wiki=held, code=held)])
    loop.stop_by(signal.SIGTERM, at=3)  # 1: a step, 2: wiki, 3: code
    assert loop.trainer.run() == signal.SIGTERM
    assert not [name for line in metrics(tmp_path / "run") for name in line if name.startswith("validation")]


def test_a_set_whose_loss_is_no_number_is_named(tmp_path: Path) -> None:
    held = Held([[1]])
    loop = Loop(tmp_path, *ONE_STEP, hooks=[validation(0, held, wiki=held, code=Held([[2]]))])
    loop.engine.eval_loss = lambda batch: WeightedSum(batch.labels.sum() * (math.nan if batch.labels.sum() > 1 else 1), 1.0)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^step 1: validation loss of code nan: training diverged"):
        loop.trainer.run()


def test_text_of_no_bytes_has_no_bits_per_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, Held([[0, 0]]))]).trainer.run()
    assert set(metrics(tmp_path / "run")[-1]) == {"step", "validation/loss", "validation/perplexity", "validation/samples"}
    assert capsys.readouterr().out.splitlines()[-1] == "step 1: validation loss 0.0000, perplexity 1.00"


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_before_its_checkpoint(tmp_path: Path, lost: float) -> None:
    events: list[Any] = []
    loop = Loop(tmp_path, *ONE_STEP, hooks=[validation(0, Held([[1]])), checkpoints(1, events)], events=events)
    loop.engine.eval_loss = lambda batch: WeightedSum(torch.tensor(lost), 1.0)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=f"^step 1: validation loss {lost}: training diverged; start anew in another"):
        loop.trainer.run()
    assert [event for event in loop.events if isinstance(event, int)] == []
    assert "validation/loss" not in metrics(tmp_path / "run")[-1]


def test_a_loss_beyond_all_numbers_has_a_finite_perplexity(tmp_path: Path) -> None:
    Loop(tmp_path, *ONE_STEP, hooks=[validation(0, Held([[1000]]))]).trainer.run()
    assert metrics(tmp_path / "run")[-1]["validation/perplexity"] == math.exp(700)


def test_no_validation_after_a_signal(tmp_path: Path) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[validation(1, Held([[1]]))])
    loop.stop_by(signal.SIGTERM, at=3)  # 1: a step, 2: its validation, 3: a step
    assert loop.trainer.run() == signal.SIGTERM
    assert validated(tmp_path) == [1]
    assert (loop.trained, loop.events.count("evaluate")) == (2, 1)  # not even a batch


def test_no_validation_after_a_signal_in_the_last_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path, *ONE_STEP, hooks=[validation(1, Held([[1]]))])
    loop.stop_by(signal.SIGTERM, at=1)
    assert loop.trainer.run() is None
    assert loop.events.count("evaluate") == 0


def test_a_signal_ends_a_validation_after_the_running_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(tmp_path, STEPS, hooks=[validation(1, Held([[1]] * 9))])
    loop.stop_by(signal.SIGINT, at=3)  # in the second batch
    assert loop.trainer.run() == signal.SIGINT
    assert (loop.trained, loop.events.count("evaluate")) == (1, 2)
    assert validated(tmp_path) == []
    assert "validation" not in capsys.readouterr().out


def checkpoints(every_steps: int, events: list[Any], asynchronous: bool = False) -> Checkpoints:
    saver: Any = Saves(events, asynchronous)
    return Checkpoints(saver, every_steps)


def saved(events: list[Any]) -> list[int]:
    """The steps whose checkpoints were finished."""
    return [event for event in events if isinstance(event, int)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("every_steps", "expected"), [(2, [2, 4, 5]), (5, [5]), (0, [5]), (1, [1, 2, 3, 4, 5])])
def test_a_checkpoint_every_n_steps_and_one_at_the_end(
    tmp_path: Path, every_steps: int, expected: list[int], asynchronous: bool
) -> None:
    events: list[Any] = []
    Loop(tmp_path, STEPS, hooks=[checkpoints(every_steps, events, asynchronous)], events=events).trainer.run()
    assert saved(events) == expected


@pytest.mark.parametrize(("stopped_in", "expected"), [(1, [1]), (2, [2]), (3, [2, 3]), (4, [2, 4])])
def test_an_interruption_saves_its_step_once(tmp_path: Path, stopped_in: int, expected: list[int]) -> None:
    events: list[Any] = []
    loop = Loop(tmp_path, STEPS, hooks=[checkpoints(2, events, asynchronous=True)], events=events)
    loop.stop_by(signal.SIGTERM, at=stopped_in)
    loop.trainer.run()
    assert saved(events) == expected


def test_a_run_that_has_nothing_to_do_deletes_old_checkpoints(tmp_path: Path) -> None:
    """A process that was killed after its last checkpoint may not have come to that."""
    events: list[Any] = []
    hook = checkpoints(1, events)
    Loop(tmp_path, *ONE_STEP, hooks=[hook], events=events, first_step=1).trainer.run()
    assert (events, hook.saver.cleared) == ([], 1)  # type: ignore[attr-defined]


def test_the_end_waits_for_what_is_still_being_deleted(tmp_path: Path) -> None:
    """A rank leaves by os._exit, which would end the thread that deletes an old checkpoint in the middle."""
    events: list[Any] = []
    loop = Loop(tmp_path, STEPS, hooks=[checkpoints(1, events)], events=events)
    loop.trainer.run()
    assert "closed" not in events
    loop.trainer.close()
    assert events[-1] == "closed"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    events: list[Any] = []
    hook = checkpoints(2, events, asynchronous=True)
    loop = Loop(tmp_path, "--training.steps=6", hooks=[hook], events=events)
    calls = iter(range(1, 7))

    def written() -> None:
        hook.saver.written = next(calls) == 4  # type: ignore[misc]  # in the fourth step the second one's is complete

    loop.engine.during = written
    loop.trainer.run()
    seen = [event[0] if isinstance(event, tuple) else event for event in events]
    # The fourth step's checkpoint is begun after the second one's is in place; the last step's state stays as it is.
    assert seen == ["train", "train", "copied", "train", "train", 2, "copied", "train", "train", 4, "waits", 6]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("place", ["begin", "finish"])
def test_a_checkpoint_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, place: str, asynchronous: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Any] = []
    hook = checkpoints(2, events, asynchronous)
    hook.saver.faults[place] = UserError("step_00000002: no room")  # type: ignore[attr-defined]
    assert Loop(tmp_path, STEPS, hooks=[hook], events=events).trainer.run() is None
    assert saved(events) == [4, 5]
    assert capsys.readouterr().err == (
        "warning: step_00000002: no room; training goes on, and the next checkpoint tries again\n"
    )


def test_a_run_whose_last_checkpoint_cannot_be_written_ends_with_the_error(tmp_path: Path) -> None:
    events: list[Any] = []
    hook = checkpoints(0, events)
    hook.saver.faults["finish"] = UserError("no room")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"^no room$"):
        Loop(tmp_path, STEPS, hooks=[hook], events=events).trainer.run()


def test_an_interruption_saves_its_step_even_if_the_checkpoint_before_fails(tmp_path: Path) -> None:
    events: list[Any] = []
    hook = checkpoints(2, events, asynchronous=True)
    loop = Loop(tmp_path, STEPS, hooks=[hook], events=events)
    loop.stop_by(signal.SIGTERM, at=3)
    hook.saver.faults["finish"] = UserError("no room")  # type: ignore[attr-defined]
    assert loop.trainer.run() == signal.SIGTERM
    assert saved(events) == [3]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_is_not_finite_ends_the_run(tmp_path: Path, asynchronous: bool) -> None:
    events: list[Any] = []
    hook = checkpoints(2, events, asynchronous)
    hook.saver.faults["finish"] = NotFiniteError("model/w is not finite")  # type: ignore[attr-defined]
    message = r"the weights or the optimizer's state are not finite \(model/w is not finite\): training diverged; start anew"
    with pytest.raises(UserError, match=message):
        Loop(tmp_path, STEPS, hooks=[hook], events=events).trainer.run()
    assert saved(events) == []


def test_the_way_back_from_a_state_that_is_not_finite_is_the_checkpoint_before(tmp_path: Path) -> None:
    events: list[Any] = []
    hook = checkpoints(4, events, asynchronous=True)
    hook.saver.faults["finish"] = NotFiniteError("model/w is not finite")  # type: ignore[attr-defined]
    for step in (2, 4):  # of which the second one is written while that of step 4 is found out
        (tmp_path / f"run/checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"run/checkpoints/step_{step:08d}/complete.json").touch()
    with pytest.raises(
        UserError, match=r"resume from \S*step_00000002 with a lower rate, such as --resume=step:2 --opt"
    ) as caught:
        Loop(tmp_path, STEPS, hooks=[hook], events=events).trainer.run()
    assert "skip_samples" not in str(caught.value)


def test_divergence_leaves_the_checkpoint_that_was_being_written(tmp_path: Path) -> None:
    events: list[Any] = []
    hook = checkpoints(2, events, asynchronous=True)
    loop = Loop(tmp_path, STEPS, hooks=[hook], events=events, results=[StepResult(1.0, 1.0)] * 2 + [StepResult(math.nan, 1.0)])
    with pytest.raises(UserError, match="training diverged"):
        loop.trainer.run()
    assert saved(events) == [2]


@pytest.mark.parametrize("first_step", [0, 3])
def test_nothing_is_saved_without_a_step(tmp_path: Path, first_step: int) -> None:
    events: list[Any] = []
    loop = Loop(tmp_path, STEPS, hooks=[checkpoints(1, events)], first_step=first_step, events=events)
    loop.trainer.interruption.signal = signal.SIGTERM
    assert loop.trainer.run() == signal.SIGTERM
    assert events == []


def test_a_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loop(tmp_path, *ONE_STEP, hooks=[checkpoints(0, [])]).trainer.run()
    assert capsys.readouterr().out.splitlines()[-1] == "step 1: checkpoint step 1"
