"""Stage resume: a run that stops, saves and resumes gives bit for bit the losses and gradient norms of one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages.stages import Case, Options, Row
from benchmarks.gpu_stages.timing import need_package
from benchmarks.gpu_stages.trainers import ENGINES, configuration, losses, opened, refuse_fallback_of, trainer
from configs.schema import Config
from pretrain.distributed.layout import Layout
from pretrain.loop.hooks import Checkpoints

STEPS, STOP = 6, 3
SMALL = {
    "model.hidden_size": 256,
    "model.num_layers": 3,
    "model.num_heads": 64,
    "model.head_dim": 16,
    "model.ffn_hidden_size": 512,
    "model.vocab_size": 512,
    "data.sequence_length": 256,
    "training.micro_batch_size": 4,
}
WAYS = (("fsdp", "sdpa"), ("fsdp", "shared_scores"), ("zero 1", "sdpa"), ("zero 1", "shared_scores"))


def cases(options: Options) -> list[Case]:
    ways = WAYS[1:3] if options.tiny else WAYS
    return [Case(f"{engine}, {kernel}", partial(compare, options, engine, kernel)) for engine, kernel in ways]


def compare(options: Options, engine: str, kernel: str) -> Iterator[Row]:
    if engine.startswith("zero"):
        need_package("deepspeed")
    fields: dict[str, Any] = {**({} if options.tiny else SMALL), **ENGINES[engine]}
    fields |= {"model.attention_kernel": kernel, "model.dropout": 0.1, "training.deterministic": True}
    config = configuration(options, fields, 2, STEPS)
    whole, parts = (options.folder / f"{engine}-{kernel}-{name}" for name in ("whole", "parts"))
    with opened(config) as layout:
        train(config, layout, whole, STEPS)
        checkpoint = train(config, layout, parts, STOP)
        train(config, layout, parts, STEPS, checkpoint)
    refuse_fallback_of(config, options.device)
    straight, resumed = (losses(folder) for folder in (whole, parts))
    equal = straight == resumed and len(straight) == STEPS
    yield {"engine": engine, "kernel": kernel, "steps": STEPS, "stopped": STOP, "last_loss": straight[-1][1], "ok": equal}


def train(config: Config, layout: Layout, folder: Path, until: int, checkpoint: Path | None = None) -> Path | None:
    """Train to step `until`; a run that stops early leaves the checkpoint that is returned."""
    with trainer(config, layout, folder, checkpoint) as run:
        while run.step < until:
            run.advance()
        if until == STEPS:
            return None
        checkpoints = run.hook(Checkpoints)
        checkpoints.save_now(run)
        return checkpoints.saver.store.path(until)
