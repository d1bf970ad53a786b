"""Checkpoints that nobody trained, for tests of what is done with one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from configs.load import load_config
from configs.schema import Config
from data_pipeline.prepare.tokenizer import Tokenizer, train
from model.decoder import DecoderLM
from model.initialization import init_weights
from pretrain.checkpoints.folder import TrainState
from pretrain.checkpoints.state import WEIGHTS, State
from pretrain.checkpoints.store import CheckpointStore
from tests.helpers import write_run


def write_checkpoint(
    config: Config, tensors: Mapping[str, Mapping[str, Tensor]], train: TrainState, tokenizer: str = "{}"
) -> Path:
    """A checkpoint in the run's folder of `config`, of tensors by kind and name, after as many steps as `train` says."""
    state = State.unsharded(tensors, {"step": torch.tensor(float(train.step))})
    return CheckpointStore(Path(config.run.folder)).save_alone(config, train, tokenizer, state)


def random_checkpoint(
    folder: Path, *overrides: str, vocabulary: int = 300, noise: float = 0.3, factor: float = 1.0, name: str = "run"
) -> Path:
    """A run's folder with a checkpoint and a tokenizer of Python's documentation.

    Every weight is its initial one and noise, so that none is zero or one, times `factor`.
    """
    tokenizer = train([topics[topic] for topic in sorted(topics)[:20]], vocabulary)
    config = load_config(write_run(folder, folder / "data", name), ["--model.hidden_size=32", *overrides])
    config = config.resolved(Tokenizer(tokenizer, "test").vocab_size)
    model = DecoderLM(config.model)
    init_weights(model, 5)
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: factor * (value.detach() + noise * torch.randn(value.shape, generator=generator))
        for name, value in model.named_parameters()
    }
    zeros = {kind: {name: torch.zeros_like(value) for name, value in weights.items()} for kind in ("exp_avg", "exp_avg_sq")}
    write_checkpoint(config, {WEIGHTS: weights, **zeros}, TrainState(3, 1, "d" * 64), tokenizer)
    return Path(config.run.folder)
