"""Whole runs with bad steps: they go on without those, name their samples, and end if there are too many in a row."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs.load import load_config
from data_pipeline.read.dataset import TokenDataset
from model.decoder import DecoderLM
from model.initialization import init_weights
from pretrain.objectives.base import WeightedSum
from pretrain.objectives.next_token import NextToken
from tests.dist.test_resume import assert_equal_checkpoints, train_here
from tests.helpers import ROOT, forked, free_port, launched_as, losses_of, metrics, numbers, resolved, run_ranks, write_run

if TYPE_CHECKING:
    from tests.helpers import Opener

BATCH, LENGTH, STEPS = 8, 16, 6
RATES = (0.005, 0.01, 0.01, 0.00775, 0.00325, 0.001)  # warmup over 2 steps, then 0.1 + 0.9·(1 + cos(π·k/3))/2
SPARED = ("query_embedding", "key_embedding", "value_embedding")  # by weight decay, beside vectors


def training_data(config_path: Path) -> TokenDataset:
    config = load_config(config_path)
    data = TokenDataset(config.data.parts[0].path, "train", LENGTH, config.run.seed)
    data.prepare_range(0, 2 * BATCH * STEPS)
    return data


def reference(config_path: Path, samples: Sequence[Sequence[int] | None]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step by plain torch, from the numbers of its samples; None leaves a step out."""
    config, data = load_config(config_path).resolved(300), training_data(config_path)
    model = DecoderLM(config.model)
    init_weights(model, config.run.seed)
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith(SPARED)]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(SPARED)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    figures = []
    for rate, own in zip(RATES, samples, strict=True):
        if own is None:
            continue
        tokens = torch.stack([torch.from_numpy(data.sample(number)) for number in own])
        loss = losses_of(model, tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        figures.append((loss.item(), norm.item()))
    return figures


def steps_without(left_out: set[int]) -> list[list[int]]:
    """The samples of each step if these are left out."""
    numbers_left = [number for number in range(2 * BATCH * STEPS) if number not in left_out]
    return [numbers_left[step * BATCH : (step + 1) * BATCH] for step in range(STEPS)]


def spoil(samples: Sequence[np.ndarray]) -> Callable[[], None]:
    """Make the loss of every micro-batch with one of these samples NaN, in this process; undone by what is returned."""
    original, wanted = NextToken.loss, [torch.from_numpy(sample[1:]) for sample in samples]

    def loss(self: NextToken, own: Any, labels_BS: torch.Tensor, *others: Any) -> WeightedSum:
        total = original(self, own, labels_BS, *others)
        bad = any(torch.equal(row, sample) for row in labels_BS for sample in wanted)
        return WeightedSum(total.loss * math.nan, total.weight) if bad else total

    NextToken.loss = loss  # type: ignore[assignment, method-assign]

    def undo() -> None:
        NextToken.loss = original  # type: ignore[method-assign]

    return undo


BAD = (19, 37)  # in the third and the fifth step
LEFT_OUT = "--training.skip_samples=[[19, 20], [37, 38]]"
LAYOUTS = {"pipeline": ["--parallel.pipeline=2"], "fsdp": ["--backend=fsdp"]}


def train_on_bad_samples(rank: int, ranks: int, port: int, path: Path) -> None:
    data = training_data(path)
    with launched_as(rank, ranks, port) as opened:
        undo = spoil([data.sample(number) for number in BAD])
        for name, settings in LAYOUTS.items():
            for kind, more in {"skips": [], "leaves out": [LEFT_OUT]}.items():
                train_here(opened, path, [*settings, *more, f"--run.folder={path.parent}/{name}/{kind}"], "none")
        undo()


def test_bad_samples_are_named_and_can_be_left_out(tmp_path: Path, prepared: Path) -> None:
    path = write_run(tmp_path, prepared)
    run_ranks(train_on_bad_samples, 2, 2, free_port(), path)
    whole, without = steps_without(set()), reference(path, steps_without(set(BAD)))
    expected = reference(path, [None if set(BAD) & set(samples) else samples for samples in whole])
    for name in LAYOUTS:
        lines = metrics(tmp_path / name / "skips")
        skipped = [line for line in lines if "skipped" in line]
        assert [(line["step"], line["skipped"], line["skipped_samples"]) for line in skipped] == [
            (3, 1, [[16, 24]]),
            (5, 2, [[32, 40]]),
        ]
        rates = numbers(lines, "learning_rate")
        torch.testing.assert_close(torch.tensor(rates)[:, 0], torch.tensor(RATES), rtol=1e-6, atol=0)
        found = torch.tensor(numbers(lines, "loss", "grad_norm"))
        torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-5, atol=1e-6, msg=f"{name}: {found}, {expected}")
        lines = metrics(tmp_path / name / "leaves out")
        assert not any("skipped" in line for line in lines)
        found = torch.tensor(numbers(lines, "loss", "grad_norm"))
        torch.testing.assert_close(found, torch.tensor(without), rtol=2e-5, atol=1e-6, msg=f"{name}: {found}, {without}")


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import launch.pretrain
from launch.common import run_command
from tests.dist.test_skipped_runs import spoil, training_data
data = training_data(Path({path!r}))
spoil([data.sample(number) for number in {bad}])
run_command(launch.pretrain.main)
"""


def test_too_many_in_a_row_end_the_run_with_one_error_whose_advice_helps(tmp_path: Path, prepared: Path) -> None:
    path, script = write_run(tmp_path, prepared), tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), path=str(path), bad=(19, 25)))
    settings = ["--checkpoint.every_steps=2", "--training.skip.nonfinite=1"]
    with forked([str(script), "--config", str(path), *settings], 2) as ranks:
        assert ranks.join(60) == [1, 1], ranks.report()
        errors = ranks.errors(0) + ranks.errors(1)
    (error,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "Traceback" not in errors
    assert error.startswith("error: step 4: loss nan, gradient norm inf, not finite in 2 steps in a row: training diverged; ")
    folder = path.with_suffix("") / "checkpoints"
    assert sorted(entry.name for entry in folder.iterdir()) == ["latest", "step_00000002"]
    advice = re.search(r"leave out the samples of these steps, \[\[16, 32\]\]: resume from \S+, such as (.*)$", error)
    assert advice is not None, error
    with forked([str(script), "--config", str(path), *settings, *shlex.split(advice[1])], 2) as ranks:
        assert ranks.join(60) == [0, 0], ranks.report()
    lines = metrics(path.with_suffix(""))
    assert not any("skipped" in line for line in lines)
    expected = torch.tensor(reference(path, steps_without(set(range(16, 32)))))
    torch.testing.assert_close(torch.tensor(numbers(lines, "loss", "grad_norm")), expected, rtol=2e-5, atol=1e-6)


SIGMA, WINDOW, WATCHED_STEPS = 0.8, 6, 14
WATCHED = {
    "pipeline": ["--parallel.pipeline=2", "--training.precision=bf16"],
    "fsdp": ["--backend=fsdp", "--gha.stage=constrain", "--gha.groups=3", "--gha.gram_decay=0.9", "--gha.alpha=0.5"],
}


def straight_and_in_parts(rank: int, ranks: int, port: int, path: Path) -> None:
    from pretrain.loop import skipping

    skipping.WINDOW, skipping.FEWEST = WINDOW, WINDOW // 2
    with launched_as(rank, ranks, port) as opened:
        for name, settings in WATCHED.items():
            common = [
                *settings,
                "--optimizer.lr=1e-4",
                f"--training.skip.spike_sigma={SIGMA}",
                f"--training.steps={WATCHED_STEPS}",
                "--model.dropout=0.1",
            ]
            folder = path.parent / name
            train_here(opened, path, [*common, f"--run.folder={folder}/whole"], "none")
            for part, stop_at in enumerate((2, 9, None)):
                train_here(opened, path, [*common, f"--run.folder={folder}/parts"], "auto" if part else "none", stop_at)


def watched(lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray, list[int]]:
    """Loss and norm of all steps, and which of them, counted from 0, were skipped."""
    steps = [line for line in lines if "grad_norm" in line]
    figures = [(line["loss"] + line.get("loss/gha", 0.0), line["grad_norm"]) for line in steps]
    return np.array(figures), [line["step"] - 1 for line in lines if "skipped" in line]


def test_a_run_in_parts_skips_what_a_straight_one_skips(tmp_path: Path, prepared: Path) -> None:
    path = write_run(tmp_path, prepared)
    run_ranks(straight_and_in_parts, 2, 2, free_port(), path)
    for name in WATCHED:
        whole, parts = (metrics(tmp_path / name / run) for run in ("whole", "parts"))
        figures, skipped = watched(whole)
        expected = []
        for step in range(WINDOW // 2, WATCHED_STEPS):
            last = figures[max(0, step - WINDOW) : step]
            if (figures[step] > last.mean(0) + SIGMA * last.std(0, ddof=1)).any():
                expected.append(step)
        assert skipped == expected, (name, skipped, expected)
        assert len(skipped) > 1, name
        found, again = watched(parts)
        assert (found == figures).all(), name
        assert again == skipped, name
        assert_equal_checkpoints(
            *(tmp_path / name / run / f"checkpoints/step_{WATCHED_STEPS:08d}" for run in ("whole", "parts"))
        )


GROUPED = [
    "--gha.stage=constrain",
    "--gha.groups=3",
    "--gha.gram_decay=0.5",
    "--gha.alpha=0.7",
    "--gha.beta=0.5",
    "--model.init_std=0.2",  # heads that differ from the first step on
    "--schedule.warmup_steps=0",
    "--schedule.min_lr_ratio=1",  # the rate is that of the other steps
    "--validation.every_steps=0",
]
GROUPED_LAYOUTS = {"zero1": ["--parallel.zero_stage=1"], "pipeline": ["--parallel.pipeline=2", "--gha.feature_map=output"]}


class Chosen:
    """A loader whose steps are some of another's."""

    def __init__(self, loader: Any, steps: Sequence[int]) -> None:
        self.loader, self.steps = loader, steps

    def step(self, step: int) -> Any:
        return self.loader.step(self.steps[step])


def refuse(grad_norm: float, own_loss: Callable[[], float]) -> bool:
    return False


def grouped(opened: Opener, path: Path, settings: Sequence[str], steps: Sequence[int], refused: Sequence[int]) -> Any:
    """Train on the batches of `steps` without taking those that are `refused`; weights, optimizer and groups of heads."""
    from pretrain.build import build_trainer
    from pretrain.grouping.grouping import HeadGrouping

    config = resolved(path, [*GROUPED, *settings])
    with opened(config.parallel) as layout:
        trainer = build_trainer(config, layout)
        trainer.progress.speaks = False
        trainer.loader, loader = Chosen(trainer.loader, steps), trainer.loader  # type: ignore[assignment]
        for step in range(len(steps)):
            if steps[step] in refused:
                trainer.skipping.accepts = refuse  # type: ignore[method-assign]
            else:
                vars(trainer.skipping).pop("accepts", None)
            trainer.advance()
            assert trainer.last.skipped == (steps[step] in refused)
        loader.close()
        grouping = trainer.hook(HeadGrouping)
        state = [part.tensor.clone() for part in trainer.backend.state().parts]
        return [*state, grouping.running_LNN, grouping.labels_LN, torch.tensor(grouping.calm)]


def grouped_with_and_without(rank: int, ranks: int, port: int, path: Path) -> None:
    with launched_as(rank, ranks, port) as opened:
        for name, settings in GROUPED_LAYOUTS.items():
            found, expected = (
                grouped(opened, path, settings, steps, refused) for steps, refused in ((range(6), (0, 3)), ((1, 2, 4, 5), ()))
            )
            assert [number for number, pair in enumerate(zip(found, expected, strict=True)) if not torch.equal(*pair)] == [], (
                name
            )


def test_groups_of_heads_take_nothing_from_a_skipped_step(tmp_path: Path, prepared: Path) -> None:
    """Equal to the bit to a run that has never seen the batches of those steps."""
    run_ranks(grouped_with_and_without, 2, 2, free_port(), write_run(tmp_path, prepared))
