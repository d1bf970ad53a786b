"""Checkpoints that nobody trained, for tests of what is done with one."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from configs.load import load_config
from data_pipeline.prepare.tokenizer import Tokenizer, train
from model.decoder import DecoderLM
from model.initialization import init_weights
from pretrain.checkpoints.portable import MOMENTS, WholeState, write_portable
from pretrain.checkpoints.store import TrainState
from tests.helpers import write_run


def random_checkpoint(
    folder: Path, *overrides: str, vocabulary: int = 300, noise: float = 0.3, factor: float = 1.0, name: str = "run"
) -> Path:
    """A run's folder with a portable checkpoint and a tokenizer of Python's documentation.

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
    zeros: Any = {kind: {name: torch.zeros_like(value) for name, value in weights.items()} for kind in MOMENTS}
    state = WholeState({"model": weights, **zeros}, 3)
    write_portable(Path(config.run.folder), config, TrainState(3, 1, "d" * 64), tokenizer, state)
    return Path(config.run.folder)
