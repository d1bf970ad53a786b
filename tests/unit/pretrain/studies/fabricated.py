"""Folders of runs that tests write: what a study leaves, with losses that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.load import to_yaml
from configs.schema import Config

TOKENS = 32  # of a step
STEPS = 10


def config_of(folder: Path, steps: int = STEPS, seed: int = 0, lr: float = 1e-3, **model: Any) -> Config:
    """A resolved configuration of a small model: vocabulary 10, width 8, 2 layers."""
    fields = {"attention": "mha", "hidden_size": 8, "num_layers": 2, "num_heads": 2, "head_dim": 4, "vocab_size": 10} | model
    sections = {
        "run": {"folder": str(folder), "seed": seed},
        "model": {"position": "none"} | fields,
        "data": {"path": "data", "sequence_length": 16},
        "training": {"steps": steps, "global_batch_size": 2, "micro_batch_size": 2},
        "optimizer": {"lr": lr},
        "schedule": {"warmup_steps": 1},
    }
    return Config.model_validate(sections).resolved(10)


def write_run(
    folder: Path,
    losses: Mapping[int, float],
    seconds: float = 1.0,
    done: int = STEPS,
    sets: Sequence[str] = (),
    **fields: Any,
) -> Path:
    """A run of `done` steps, `seconds` each, with validation losses after some; bits per byte are a quarter of them.

    Training losses are 5 − 0.1 × step; heads are 1 − loss / 100 alike. The loss of the n-th named set is n more.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config_of(folder, **fields)), encoding="utf-8")
    lines: list[dict[str, Any]] = []
    for step in range(1, done + 1):
        figures = {"loss": 5 - 0.1 * step, "tokens": step * TOKENS, "seconds": seconds, "grad_norm": 1.0}
        lines.append({"step": step, **figures, "tokens_per_second": TOKENS / seconds, "memory_gib": 0.5 + 0.01 * step})
        if step in losses:
            of_sets = {f"validation/{name}/loss": losses[step] + number for number, name in enumerate(sets)}
            of_sets |= {f"validation/{name}/bits_per_byte": (losses[step] + number) / 4 for number, name in enumerate(sets)}
            alike = {"heads/output_similarity": 1 - losses[step] / 100, "heads/layers/output_similarity": [1.0, 0.9]}
            lines.append({"step": step, **alike})
            mean = {"validation/loss": losses[step], "validation/bits_per_byte": losses[step] / 4}
            lines.append({"step": step, **of_sets, **mean, "validation/perplexity": math.exp(losses[step])})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_child(
    study: Path,
    part: str,
    axes: Mapping[str, str],
    losses: Mapping[int, float],
    status: str = "finished",
    match: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """A child as launch/sweep.py leaves it."""
    folder = write_run(study / part / ",".join(axes.values()), losses, **fields)
    child = {"study": "fabricated", "part": part, "axes": dict(axes), "set": {}, "match": match, "changed": {}, "processes": 1}
    (folder / "child.json").write_text(json.dumps(child), encoding="utf-8")
    error = "out of <memory>" if status == "failed" else None
    outcome = {"status": status, "error": error, "seconds": 20.0, "started": "", "ended": "", "attempts": 1}
    if status != "running":
        (folder / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    return folder
