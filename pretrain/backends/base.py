"""The seam between our loop and an engine: a whole optimizer step, not its parts, because pipelines own theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.block import Block
from model.layers import Layers
from pretrain.checkpoints.state import State
from pretrain.distributed.layout import Layout
from pretrain.objectives.base import Objective, WeightedSum
from pretrain.report.step_parts import ATTENTION, BLOCKS, EMBEDDING, LOADER, LOSS, MLP, NORMS, RESIDUAL

# Whether a step is taken, from its gradient norm and a function that gives this rank's share of its loss (`StepResult.loss`).
# All ranks ask once a step and get the same answer; collectives may run.
Accepts = Callable[[float, Callable[[], float]], bool]


def finite(grad_norm: float, loss: Callable[[], float]) -> bool:
    """The `Accepts` of steps whose gradients are finite. A loss that is not has gradients that are not, either."""
    return math.isfinite(grad_norm)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports."""

    # What is minimised, objective and auxiliary terms, in nats: the weighted mean over the step's labels. Engines without
    # pipelines give this data-parallel rank's share of it, pipelines the mean itself on every rank; the mean over ranks is the
    # step's loss either way.
    loss: float
    grad_norm: float  # of the unsharded model, over all ranks, before clipping
    auxiliary: dict[str, float] = field(default_factory=dict)  # terms of model/auxiliary.py by name, parts of `loss`, alike
    skipped: bool = False  # the step was not accepted: weights and optimizer are as they were


@dataclass(frozen=True)
class Timed:
    """A method whose time belongs to a part of a step (pretrain/report/step_parts.py).

    `waits`: whether it can wait for other ranks. Its holder is an instance, or a class of which all instances are meant.
    """

    holder: Any
    method: str
    part: str
    waits: bool


_MODULES = {"attention": ATTENTION, "mlp": MLP, "token_embedding": EMBEDDING, "position_embedding": EMBEDDING}


def timed_modules(module: torch.nn.Module, waits: bool) -> Iterator[Timed]:
    """The parts of a model or of a stage. Inside a block that torch.compile runs there are none: it is one part."""
    for name, child in module.named_children():
        part = NORMS if name.endswith("_norm") else _MODULES.get(name)
        if part is not None:
            yield Timed(child, "forward", part, waits)
        elif isinstance(child, Block):
            if child._compiled_call_impl is not None:
                yield Timed(child, "_compiled_call_impl", BLOCKS, waits=True)
                continue
            yield Timed(child, "forward", RESIDUAL, waits)
            yield from timed_modules(child, waits)
        else:
            yield from timed_modules(child, waits)


def timed_objective(objective: Objective, waits: bool) -> Iterator[Timed]:
    """Its preparation of batches and its loss."""
    yield Timed(objective, "examples", LOADER, waits=False)
    yield Timed(objective, "loss", LOSS, waits)


class Backend(Protocol):
    """An engine that holds the model and its optimizer, built from a resolved configuration with its initial weights."""

    def __init__(self, config: Config, layout: Layout, checkpoint: Path | None = None) -> None:
        """`layout` is open; every rank builds its own. `checkpoint` is what `load_state` will read, if that is known by now."""

    @property
    def module(self) -> torch.nn.Module:
        """The model, to count its parameters."""

    @property
    def layers(self) -> Layers:
        """How the model's layers are made, and where they leave loss terms."""

    def train_step(self, micro_batches: list[Batch], learning_rate: float, accepts: Accepts = finite) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step if `accepts` says so.

        Otherwise weights and the optimizer's state stay as they are to the bit, and nothing is left of the gradients.
        """

    def eval_loss(self, batch: Batch) -> WeightedSum:
        """The objective's weighted sums over the labels of each example of a micro-batch, (B,), on every rank that has it.

        Without gradient and without dropout.
        """

    def timed(self) -> Iterator[Timed]:
        """The methods that are parts of its step."""

    def state(self) -> State:
        """All that a checkpoint keeps of this rank's model and optimizer. No collective runs."""

    def load_state(self, read: Callable[[State], None]) -> None:
        """Let `read` fill `state`, whatever layout wrote it, then bring all copies of the weights in line.

        Every rank calls it; `read` raises on all ranks or on none.
        """
