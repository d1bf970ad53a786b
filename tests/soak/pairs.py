"""Resume anywhere: a run that resumes on any layout is the run that went on, and loses nothing that the checkpoint holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.unsharded import load_state
from tests.helpers import write_run
from tests.soak.draw import Layout, Pair, overrides
from tests.soak.worlds import Worlds

CUT, END = 4, 8  # of a pair of layouts: the step of the checkpoint and the last one
KEEP = "--checkpoint.keep_last=9"
PARTS = 10  # steps of each of the three parts of a run that resumes on its own layout
EQUAL = ("learning_rate", "tokens", "validation/samples")  # figures that no layout changes
UNLIKE = ("time", "seconds", "tokens_per_second", "memory_gib")  # figures that no two runs share
# Relative differences that are rounding. A value rounded to bf16 is off by up to u = 2^-9. In a loss these average out over
# labels and logits to u/4, in a norm they come to 4u after a few steps; by then training itself has moved both by 1 % and more.
LIMITS = {"fp32": (1e-6, 1e-6), "bf16": (2**-11, 2**-7)}  # loss, gradient norm


Figures = dict[int, dict[str, Any]]  # of each step, by name


@dataclass
class Outcome:
    """What was found: the largest relative differences of figures, and what should not be."""

    loss: float = 0.0
    grad_norm: float = 0.0
    faults: list[str] = field(default_factory=list)


def check_pair(pair: Pair, worlds: Worlds, folder: Path, data: Path, parts: int = PARTS) -> Outcome:
    """Run the pair in `folder`, which is then deleted if nothing is wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = write_run(folder, data)
    outcome = _check_same(pair, worlds, config, parts) if pair.same else _check_other(pair, worlds, config)
    if not outcome.faults:
        shutil.rmtree(folder)
    return outcome


def _check_other(pair: Pair, worlds: Worlds, config: Path) -> Outcome:
    source, target = config.parent / "source", config.parent / "target"
    settings = [*overrides(pair.common), f"--training.steps={END}", f"--checkpoint.every_steps={CUT}", KEEP]
    _pretrain(worlds, pair.source, config, settings, source)
    _pretrain(worlds, pair.target, config, settings, target, checkpoint(source, CUT))
    outcome = Outcome()
    outcome.faults += different_tensors(checkpoint(source, CUT), checkpoint(target, CUT))
    precisions = {str(layout.values["training.precision"]) for layout in (pair.source, pair.target)}
    compare_figures(figures(source), figures(target), CUT, outcome, *LIMITS[min(precisions)])  # bf16 if one is
    return outcome


def _check_same(pair: Pair, worlds: Worlds, config: Path, parts: int) -> Outcome:
    """A run, one that resumes after its first third, and one that resumes after the second third of that."""
    steps, root = 3 * parts, config.parent
    settings = [*overrides(pair.common), f"--training.steps={steps}", f"--checkpoint.every_steps={parts}", KEEP]
    whole, second, third = root / "whole", root / "second", root / "third"
    _pretrain(worlds, pair.source, config, settings, whole)
    _pretrain(worlds, pair.source, config, settings, second, checkpoint(whole, parts))
    _pretrain(worlds, pair.source, config, settings, third, checkpoint(second, 2 * parts))
    outcome = Outcome()
    for run, first in ((second, parts), (third, 2 * parts)):
        compare_figures(figures(whole), figures(run), first, outcome, 0.0, 0.0)
        for step in range(first, steps + 1, parts):
            outcome.faults += different_files(checkpoint(whole, step), checkpoint(run, step))
    return outcome


def _pretrain(worlds: Worlds, layout: Layout, config: Path, settings: list[str], run: Path, resume: Path | None = None) -> None:
    arguments = ["--config", str(config), *settings, *overrides(layout.values), f"--run.folder={run}"]
    arguments += [f"--resume={resume}"] if resume else []
    worlds.pretrain(layout.processes, arguments, saves_first=resume is not None)


def checkpoint(run: Path, step: int) -> Path:
    return run / f"checkpoints/step_{step:08d}"


def figures(run: Path) -> Figures:
    """All figures of each step; several lines can be of one."""
    steps: Figures = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        of_step = steps.setdefault(line["step"], {})
        twice = sorted((of_step.keys() & line.keys()) - {"step"})
        of_step.update(line, **{f"twice {name}": True for name in twice})
    return steps


def compare_figures(expected: Figures, found: Figures, first: int, outcome: Outcome, loss: float, norm: float) -> None:
    """The steps after `first`, within relative tolerances; 0: equal in every figure. Another batch has another loss."""
    if sorted(found) != (wanted := [step for step in sorted(expected) if step > first]):
        outcome.faults.append(f"steps {sorted(found)}, not {wanted}")
        return
    for step in wanted:
        one, other = ({n: v for n, v in steps[step].items() if n not in UNLIKE} for steps in (expected, found))
        if one.keys() != other.keys():
            outcome.faults.append(f"step {step}: figures {sorted(one.keys() ^ other.keys())} on one side only")
        for name in one.keys() & other.keys():
            if loss == 0 or name in EQUAL:
                if one[name] != other[name]:
                    outcome.faults.append(f"step {step}: {name} {other[name]}, not {one[name]}")
            elif name in ("loss", "grad_norm", "validation/loss"):
                error, limit = abs(other[name] / one[name] - 1), norm if name == "grad_norm" else loss
                kind = "grad_norm" if name == "grad_norm" else "loss"
                setattr(outcome, kind, max(getattr(outcome, kind), error))
                if not error <= limit:
                    outcome.faults.append(f"step {step}: {name} {other[name]}, not {one[name]}: off by {error:.1e}")


def different_tensors(one: Path, other: Path) -> list[str]:
    """Weights and optimizer state of two checkpoints, unsharded, and what hooks keep, to the bit."""
    (first, of_first), (second, of_second) = (_unsharded(folder) for folder in (one, other))
    faults = [f"{other}: {of_second}, not {of_first}"] if of_first != of_second else []
    faults += [f"{other}: tensors {sorted(first.keys() ^ second.keys())}"] if first.keys() != second.keys() else []
    for key in sorted(first.keys() & second.keys()):
        if not torch.equal(first[key], second[key]):
            faults.append(f"{other}: {key} is not what was saved")
    return faults


def _unsharded(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    state = load_state(folder)
    scalars = {name: [float(value) for value in values] for name, values in state.scalars.items()}
    of_layout = ("config.yaml", "state.json", "engine/")
    of_hooks = {name: record for name, record in records(folder).items() if not name.startswith(of_layout)}
    return {part.key: part.tensor for part in state.parts}, {**scalars, **of_hooks}


def different_files(one: Path, other: Path) -> list[str]:
    """Every file but the configuration, which names its run, to the byte."""
    first, second = records(one), records(other)
    names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return [f"{other}: {name} is not as in {one.parents[1].name}" for name in names if name != "config.yaml"]


def records(folder: Path) -> dict[str, Any]:
    """Size and hash of each file of a checkpoint."""
    files: dict[str, Any] = json.loads((folder / "complete.json").read_text())["files"]
    return files
