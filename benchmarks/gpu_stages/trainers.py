"""Trainers of the project's own engines on random tokens, for stages of benchmarks/gpu.py: no prepared data is needed."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attention_contenders import refuse_fallback
from benchmarks.gpu_stages.stages import Options
from configs.load import load_config
from configs.schema import Config, ModelConfig
from data_pipeline.read.loader import TrainLoader
from model import initialization
from model.faults import model_faults
from pretrain.build import dropout_seed, make_backend
from pretrain.checkpoints.resume import Resumer
from pretrain.checkpoints.saver import Saver
from pretrain.checkpoints.store import CheckpointStore
from pretrain.distributed.layout import Layout
from pretrain.distributed.process import prepare_process
from pretrain.distributed.rendezvous import open_layout
from pretrain.engines import engine_faults
from pretrain.loop.hooks import Checkpoints
from pretrain.loop.skipping import Skipping
from pretrain.loop.trainer import Trainer

LARGE = Path(__file__).resolve().parents[2] / "configs" / "mhe_add_1b_zero2.yaml"
TINY = {
    "model.hidden_size": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.head_dim": 8,
    "model.ffn_hidden_size": 64,
    "model.vocab_size": 64,
    "data.sequence_length": 64,
    "training.micro_batch_size": 2,
}
DATA = "random tokens"  # in the place of the data's hash and of a tokenizer
SAMPLE = 2**14
ENGINES = {"fsdp": {"backend": "fsdp", "parallel.zero_stage": 1}, "zero 1": {"backend": "deepspeed", "parallel.zero_stage": 1}}


class RandomTokens:
    """What a TrainLoader asks of a data set."""

    def __init__(self, config: Config) -> None:
        self.vocab_size, self.length, self.seed = config.model.vocab_size, config.data.sequence_length, config.run.seed
        self.samples_per_epoch = sys.maxsize

    def prepare_range(self, first: int, last: int) -> None:
        """All samples are readable."""

    def sample(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number]).integers(self.vocab_size or 0, size=self.length + 1)


def configuration(options: Options, fields: dict[str, Any], accumulation: int, steps: int) -> Config:
    """The 1 B configuration with other `fields`, by dotted names, and so many micro-batches a step; tiny in a rehearsal."""
    run: dict[str, Any] = {"schedule.warmup_steps": 0, "logging.tensorboard": False, "training.steps": steps}
    embeds = fields.get("model.attention", "mhe_add").startswith("mhe_")
    if not embeds:
        run["model.key_embedding"] = True  # its default, since the others have no use for it
    if not embeds or fields.get("model.attention_kernel") == "shared_scores":
        run["model.embedding_position"] = "after"  # the default; heads whose embeddings are rotated share no scores
    given = {**(TINY if options.tiny else {}), **run, **fields}
    micro = given.get("training.micro_batch_size", 8)
    given |= {"training.micro_batch_size": micro, "training.global_batch_size": micro * accumulation}
    overrides = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]
    config = load_config(LARGE, overrides, [model_faults, engine_faults], world_size=1)
    return config.resolved(config.model.vocab_size or 0)


@contextmanager
def quick_weights(device: str) -> Iterator[None]:
    """Initial weights are drawn on the device: a billion of them take a CPU half a minute.

    Each is one of the first SAMPLE that a run would have, so the distribution is the same; the same parameter has the same
    weights in all models that are built within.
    """
    original = initialization.initial_value

    def drawn(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> torch.Tensor:
        sample = original(config, seed, name, torch.Size([SAMPLE])).to(device)
        draw = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return sample[torch.randint(SAMPLE, shape, generator=draw, device=device, dtype=torch.int32)]

    initialization.initial_value = drawn
    try:
        yield
    finally:
        initialization.initial_value = original


@contextmanager
def opened(config: Config) -> Iterator[Layout]:
    """The layout of this one process."""
    layout = Layout.from_environment(config.parallel)
    prepare_process(layout, config.training.deterministic)
    with open_layout(layout):
        yield layout


@contextmanager
def trainer(config: Config, layout: Layout, folder: Path, checkpoint: Path | None = None) -> Iterator[Trainer]:
    """A trainer whose run is in `folder`, restored from `checkpoint` if given; it saves when it is asked to."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(folder)})})
    resumer = Resumer(CheckpointStore(folder), layout, config, DATA, DATA)
    start = None if checkpoint is None else resumer.check([checkpoint])
    backend = make_backend(config, layout, checkpoint)
    first_step = 0 if start is None else start.train.step
    torch.manual_seed(dropout_seed(config, layout, first_step))
    if start is not None:
        resumer.restore(start, backend.load_state)
    training, tokens = config.training, RandomTokens(config)
    sizes = (training.global_batch_size, training.micro_batch_size, 0, 1)
    loader = TrainLoader(tokens, *sizes, steps=training.steps, pin_memory=layout.device.type == "cuda")
    checkpoints = Checkpoints(Saver(resumer.store, layout, config, DATA, DATA), every_steps=0)
    made = Trainer(config, layout, backend, loader, [Skipping(config, layout), checkpoints], first_step)
    made.progress.speaks = False
    try:
        yield made
    finally:
        made.close()


def refuse_fallback_of(config: Config, device: str) -> None:
    """After steps of a run: raises FellBackError if it asks for shared scores and torch's operators took over."""
    model, precision = config.model, config.training.precision
    refuse_fallback(model.attention_kernel, device, "float32" if precision == "fp32" else "bfloat16", model.head_width)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each step of the run in `folder`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def profiled(step: Any, device: str, shown: int) -> list[tuple[str, float]]:
    """The kernels that take most of a step's time on the device, and their shares; of operators on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
        if not getattr(event, "is_user_annotation", False)  # ranges around kernels, which count by themselves
    }
    total = sum(times.values()) or 1.0
    top = sorted(times.items(), key=lambda item: -item[1])[:shown]
    return [(name[:80], time / total) for name, time in top]
