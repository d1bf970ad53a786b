"""Learning rates against values worked out by hand."""

from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config
from pretrain.optim.schedule import learning_rate
from tests.helpers import write_run


def config(folder: Path, *overrides: str) -> Config:
    path = write_run(folder, folder / "data")
    return load_config(path, ["--optimizer.lr=1.0", "--schedule.min_lr_ratio=0.2", *overrides]).resolved(300)


def test_cosine_with_warmup(tmp_path: Path) -> None:
    run = config(tmp_path, "--training.steps=9", "--schedule.warmup_steps=4")
    rates = [learning_rate(step, run) for step in range(9)]
    # 0.2 + 0.8 · (1 + cos(π·k/4)) / 2 for k = 0 … 4
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.882843, 0.6, 0.317157, 0.2], abs=1e-6)


def test_wsd_is_flat_until_its_linear_decay(tmp_path: Path) -> None:
    run = config(tmp_path, "--training.steps=8", "--schedule.warmup_steps=2", "--schedule.kind=wsd", "--schedule.decay_steps=4")
    rates = [learning_rate(step, run) for step in range(8)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 7])
def test_the_last_step_has_the_smallest_rate(tmp_path: Path, kind: str, warmup: int) -> None:
    run = config(tmp_path, "--training.steps=8", f"--schedule.warmup_steps={warmup}", f"--schedule.kind={kind}")
    assert learning_rate(7, run) == pytest.approx(0.2)


def test_one_step_without_warmup(tmp_path: Path) -> None:
    assert learning_rate(0, config(tmp_path, "--training.steps=1", "--schedule.warmup_steps=0")) == 1.0
