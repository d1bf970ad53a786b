"""Checkpoints of every layout: a run that resumes on the layout that it had is exact to the bit."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
import torch

from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import ValidationLoader
from model.decoder import DecoderLM
from pretrain.checkpoints.folder import CONFIG, read_config, read_marker
from pretrain.checkpoints.unsharded import load_weights, weight_files
from pretrain.loop.evaluate import evaluate
from pretrain.objectives.base import weighted_sum
from tests.helpers import free_port, launched_as, metrics, numbers, resolved, run_ranks, write_run

if TYPE_CHECKING:
    from tests.helpers import Opener


STEP = ("step", "loss", "grad_norm", "learning_rate")
GROUPED = ["--gha.stage=constrain", "--gha.groups=3", "--gha.gram_decay=0.9", "--gha.regroup_every=3"]
# Layout: ranks, settings. Every one with dropout.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "zero0": (2, ["--parallel.zero_stage=0", *GROUPED]),
    "zero3": (2, ["--parallel.zero_stage=3", "--training.precision=bf16", "--training.recompute_activations=true"]),
    "offload": (2, ["--parallel.zero_stage=2", "--parallel.cpu_offload=true", "--training.precision=bf16"]),
    "pipeline": (2, ["--parallel.pipeline=2", "--training.precision=bf16"]),
    "fsdp": (2, ["--backend=fsdp", "--training.precision=bf16"]),
    "zero3_tensor": (4, ["--parallel.zero_stage=3", "--parallel.tensor=2", "--parallel.sequence=true"]),
    "pipeline_data": (4, ["--parallel.pipeline=2", "--parallel.zero_stage=0"]),
    "pipeline_tensor": (
        4,
        ["--parallel.pipeline=2", "--parallel.tensor=2", "--training.precision=bf16", *GROUPED, "--gha.end_step=4"],
    ),
    "fsdp_hybrid": (4, ["--backend=fsdp", "--parallel.replicate=2"]),
    "fsdp_tensor": (4, ["--backend=fsdp", "--parallel.tensor=2", "--training.precision=bf16"]),
}


def train_here(opened: Opener, config_path: Path, overrides: Sequence[str], resume: str, stop_at: int | None = None) -> None:
    """A whole run, or one that is interrupted after step `stop_at`, in this rank of a launched group."""
    from pretrain.build import build_trainer, make_resumer

    config = resolved(config_path, overrides)
    with opened(config.parallel) as layout:
        start = make_resumer(config, layout).find(resume) if resume != "none" else None
        trainer = build_trainer(config, layout, start)
        trainer.progress.speaks = False
        report = trainer.metrics.write

        def write(step: int, *values: Any) -> None:
            report(step, *values)
            if step + 1 == stop_at:
                trainer.interruption.signal = signal.SIGINT  # the ranks vote after the next step

        trainer.metrics.write = write  # type: ignore[assignment, method-assign]
        trainer.run()
        trainer.loader.close()


INTERRUPTED = {2: (2, 4), 4: (4,)}  # after which steps; two cores run four ranks slowly
STEPS = {2: 6, 4: 6}


def straight_and_in_parts(rank: int, ranks: int, port: int, config: Path, layouts: list[str]) -> None:
    with launched_as(rank, ranks, port) as opened:
        for name in layouts:
            overrides = [
                *LAYOUTS[name][1],
                "--model.dropout=0.1",
                f"--training.steps={STEPS[ranks]}",
                "--validation.every_steps=2",
            ]
            folder = config.parent / name
            train_here(opened, config, [*overrides, f"--run.folder={folder}/whole"], "none")
            for part, stop_at in enumerate((*INTERRUPTED[ranks], None)):
                train_here(opened, config, [*overrides, f"--run.folder={folder}/parts"], "auto" if part else "none", stop_at)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_a_run_in_parts_is_a_straight_one_to_the_bit(tmp_path: Path, prepared: Path, ranks: int) -> None:
    from pretrain.interop.export import export  # not in every rank: slow to import

    layouts = [name for name, (size, _) in LAYOUTS.items() if size == ranks]
    config = write_run(tmp_path, prepared)
    run_ranks(straight_and_in_parts, ranks, ranks, free_port(), config, layouts, seconds=380)
    for name in layouts:
        whole, parts = (tmp_path / name / run for run in ("whole", "parts"))
        assert numbers(metrics(parts), *STEP) == numbers(metrics(whole), *STEP), name
        assert len(numbers(metrics(whole), *STEP)) == STEPS[ranks]
        assert numbers(metrics(parts), "step", "loss/gha") == numbers(metrics(whole), "step", "loss/gha"), name
        validations = (numbers(metrics(run), "step", "validation/loss") for run in (parts, whole))
        assert next(validations) == [line for line in next(validations) if line[0] not in INTERRUPTED[ranks]], name
        last = f"checkpoints/step_{STEPS[ranks]:08d}"
        assert_equal_checkpoints(whole / last, parts / last)
        assert (export(whole, tmp_path / f"{name} exported", "auto", 10**9, None, len) / "model.safetensors").is_file()
        loss, tolerance = validation_loss(whole / last), 3e-3 if "bf16" in str(LAYOUTS[name]) else 1e-5
        assert loss == pytest.approx(numbers(metrics(whole), "validation/loss")[-1][0], rel=tolerance), name
        labels, size = held_out_text(whole / last)
        for nats, bits in numbers(metrics(whole), "validation/loss", "validation/bits_per_byte"):
            assert bits == pytest.approx(nats * labels / math.log(2) / size, rel=1e-12), name


def held_out_text(folder: Path) -> tuple[int, int]:
    """Labels of a run's validation, and the bytes of their text, which is ASCII, so that no character is cut in two."""
    config = read_config(folder)
    dataset = TokenDataset(config.data.parts[0].path, "valid", config.data.sequence_length)
    dataset.prepare_range(0, config.validation.samples or 0)
    rows = [dataset.sample(number)[1:].tolist() for number in range(config.validation.samples or 0)]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return sum(map(len, rows)), sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in rows)


def validation_loss(folder: Path) -> float:
    """By the whole model in this process, from the checkpoint's weights."""
    assert all((folder / file).is_file() for file in weight_files(folder))
    config = read_config(folder)
    model = DecoderLM(config.model)
    model.load_state_dict(load_weights(folder))
    model.float().eval()
    dataset = TokenDataset(config.data.parts[0].path, "valid", config.data.sequence_length)
    loader = ValidationLoader(dataset, config.validation.samples, 1, 0, 1)
    with torch.inference_mode():
        result = evaluate(
            lambda batch: weighted_sum(model.layers.losses(model(batch.tokens), batch.labels), batch.weights),
            loader,
            torch.device("cpu"),
        )
    assert result is not None
    return result.loss


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """Every file but the configuration, which names its run: state of the engine, generators, groups, to the byte."""
    found, expected = (read_marker(folder).files for folder in (one, other))
    assert {**found, CONFIG: None} == {**expected, CONFIG: None}
