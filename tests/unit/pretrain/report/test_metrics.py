"""Figures survive restarts and never end a run."""

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.load import load_config
from pretrain.distributed.layout import Layout
from pretrain.report.metrics import Figure, MetricsWriter
from tests.helpers import metrics, write_run

ONE = Layout()


def writer(tmp_path: Path, first_step: int = 0) -> MetricsWriter:
    return MetricsWriter(tmp_path, load_config(write_run(tmp_path, tmp_path / "data")), ONE, first_step)


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = writer(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step), "mfu": None})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    second = writer(tmp_path, first_step=2)
    second.write(3, {"loss": 30.0})
    second.close()
    assert metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]


@pytest.mark.filterwarnings(
    "error::pytest.PytestUnraisableExceptionWarning"
)  # Python 3.13 prints what a forgotten file cannot write
def test_a_full_disk_ends_the_figures_with_a_warning_but_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = writer(tmp_path)
    figures.file = open("/dev/full", "w")  # noqa: SIM115
    figures.write(1, {"loss": 1.0})
    figures.write(2, {"loss": 1.0})
    figures.close()
    assert capsys.readouterr().err.count("metrics end at step 1") == 1


def test_figures_go_on_in_a_new_file_if_the_folder_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = load_config(write_run(tmp_path, tmp_path / "data"), ["--logging.tensorboard=false"]), tmp_path / "run"
    folder.mkdir()
    figures = MetricsWriter(folder, config, ONE, 0)
    figures.write(1, {"loss": 1.0})
    shutil.rmtree(folder)
    figures.write(2, {"loss": 2.0})
    figures.write(3, {"loss": 3.0})
    figures.close()
    assert metrics(folder) == [{"step": 2, "loss": 2.0}, {"step": 3, "loss": 3.0}]
    assert capsys.readouterr().err == (
        f"warning: {folder}/metrics.jsonl: was deleted; the metrics of step 2 and later are in a new file\n"
    )


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(Is a directory\)"):
        writer(tmp_path)


def test_half_a_line_alone_is_removed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    figures = writer(tmp_path)
    figures.write(1, {"loss": 1.0})
    figures.close()
    assert metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def no_numbers(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def test_what_is_not_finite_is_not_written_as_a_number(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, tmp_path / "data"), ["--logging.tensorboard=true"])
    figures = MetricsWriter(tmp_path, config, ONE, 0)
    bad: dict[str, Figure] = {"loss": math.nan, "similarity/dunn": math.inf, "grad_norm": 1.0}
    bad["similarity/layers/dunn"] = [0.5, math.inf, math.nan]
    figures.write(1, bad)
    figures.write(2, {"similarity/layers/dunn": [math.nan]})
    figures.close()
    lines = [json.loads(line, parse_constant=no_numbers) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "grad_norm": 1.0, "similarity/layers/dunn": [0.5, None, None]},
        {"step": 2, "similarity/layers/dunn": [None]},
    ]
    (histogram,) = tensorboard_of(tmp_path).Histograms("similarity/layers/dunn")
    assert (histogram.step, histogram.histogram_value.num) == (1, 1)


def tensorboard_of(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0}).Reload()  # 0: all


def test_tensorboard_names_a_run_by_its_folder(tmp_path: Path) -> None:
    """As `tensorboard --logdir runs` finds it, whatever else lies in the run's folder."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    for name in ("first", "second", "second/pruned"):
        config = load_config(write_run(tmp_path, tmp_path / "data"), ["--logging.tensorboard=true"])
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "tensorboard").touch()
        figures = MetricsWriter(folder, config, ONE, 0)
        figures.write(1, {"loss": 1.0})
        figures.close()
    shown = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    assert sorted(shown.Runs()) == ["first", "second", "second/pruned"]


def test_events_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: str, purge_step: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    config = load_config(write_run(tmp_path, tmp_path / "data"), ["--logging.tensorboard=true"])
    message = f"^{tmp_path}: TensorBoard's events cannot be written .No space left on device.; make room or pass --logging.tens"
    with pytest.raises(UserError, match=message):
        MetricsWriter(tmp_path, config, ONE, 0)


def test_tensorboard_shows_the_loss_first_and_layers_as_one_card(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, tmp_path / "data"), ["--logging.tensorboard=true"])
    figures = MetricsWriter(tmp_path, config, ONE, 0)
    step = {"time": 1.0, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens": 256, "seconds": 0.5, "loss": 3.0, "loss/gha": 0.1}
    figures.write(1, {**step, "similarity/dunn": 0.5, "similarity/layers/dunn": [0.25, 0.75]})
    figures.close()
    assert metrics(tmp_path) == [{"step": 1, **step, "similarity/dunn": 0.5, "similarity/layers/dunn": [0.25, 0.75]}]
    shown = tensorboard_of(tmp_path)
    scalars = ["loss", "loss/gha", "optimizer/grad_norm", "optimizer/learning_rate", "similarity/dunn"]
    assert sorted(shown.Tags()["scalars"]) == [*scalars, "speed/step_seconds", "speed/tokens"]
    assert shown.Tags()["histograms"] == ["similarity/layers/dunn"]
    (histogram,) = shown.Histograms("similarity/layers/dunn")
    assert (histogram.histogram_value.min, histogram.histogram_value.max, histogram.histogram_value.num) == (0.25, 0.75, 2)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, tmp_path / "data"))
    figures = MetricsWriter(tmp_path, config, Layout(1, 2, 1, 2), 0)
    figures.write(1, {"loss": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_discards_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """As TensorBoard itself reads the run's folder: of all kinds of figures only the last value of a step is left."""
    config = load_config(write_run(tmp_path, tmp_path / "data"), ["--logging.tensorboard=true"])
    run = tmp_path / "run"
    run.mkdir()
    for number, (first_step, steps) in enumerate([(0, (1, 2, 3, 4)), (2, (3,)), (2, (3, 4))], start=1):
        figures = MetricsWriter(run, config, ONE, first_step)
        for step in steps:
            figures.write(step, {"loss": step + 10.0 * number, "similarity/layers/dunn": [float(number)]})
        figures.close()
        (events,) = run.glob("events.out.tfevents.*.*")
        events.rename(run / f"events.out.tfevents.{number}")  # as if a second had passed; names are the order
    shown = tensorboard_of(run)
    expected = [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0)]
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == expected
    histograms = [(event.step, event.histogram_value.max) for event in shown.Histograms("similarity/layers/dunn")]
    assert histograms == [(1, 1), (2, 1), (3, 3), (4, 3)]
    assert [(line["step"], line["loss"]) for line in metrics(run)] == expected


def test_the_number_of_validation_samples_is_no_chart(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, tmp_path / "data"), ["--logging.tensorboard=true"])
    figures = MetricsWriter(tmp_path, config, ONE, 0)
    values = {"validation/wiki/loss": 1.0, "validation/wiki/samples": 512, "validation/loss": 1.0, "validation/samples": 512}
    figures.write(1, values)
    figures.close()
    assert metrics(tmp_path) == [{"step": 1, **values}]
    assert set(tensorboard_of(tmp_path).Tags()["scalars"]) == {"validation/loss", "validation/wiki/loss"}


def test_notes_are_in_the_file_and_not_in_tensorboard(tmp_path: Path) -> None:
    figures = writer(tmp_path)
    shown: list[str] = []
    figures.tensorboard = Recorder(shown)
    figures.write(2, {"skipped": 1}, {"skipped_samples": [[8, 16]]})
    figures.close()
    assert metrics(tmp_path) == [{"step": 2, "skipped": 1, "skipped_samples": [[8, 16]]}]
    assert shown == ["skipped"]


class Recorder:
    def __init__(self, shown: list[str]) -> None:
        self.shown = shown

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.shown.append(name)

    def close(self) -> None:
        pass
