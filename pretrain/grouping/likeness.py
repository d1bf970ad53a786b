"""How much alike a model's heads are while it trains, and how far their embeddings have spread: `logging.heads`.

    heads/output_similarity      mean cosine of the outputs of two heads of a layer, over all pairs
    heads/attention_similarity   the same of their attention weights, for queries at some positions
    heads/query_embedding        root mean square distance of a head's e^Q from the mean over heads; key and value likewise

1 in the first two means that all heads of a layer do the same. Each is a mean over layers; heads/layers/… has each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Config, ModelConfig
from data_pipeline.read.loader import ValidationLoader
from model.attention.registry import is_head_embedding, layer_configs, variant_of
from model.gha.constraint import HeadConstraint
from pretrain.backends.base import Backend
from pretrain.checkpoints.state import WEIGHTS, Part
from pretrain.distributed.layout import Layout
from pretrain.grouping.observers import attention_layers, summed_grams
from pretrain.loop.evaluate import evaluate
from pretrain.loop.hooks import Hook, measures
from pretrain.report.metrics import Figure

if TYPE_CHECKING:
    from pretrain.loop.trainer import Trainer

SAMPLES = 16  # of the validation set
ROWS = 16  # queries of each whose attention weights are compared
COMPARED = ("output", "attention")


class HeadLikeness(Hook):
    """Writes the figures above when the model is validated."""

    priority = 60  # after validation

    def __init__(self, config: Config, layout: Layout, backend: Backend, held_out: ValidationLoader) -> None:
        """`held_out` gives the samples whose passes are observed. All ranks make one and call its methods together."""
        self.config, self.layout, self.held_out = config, layout, held_out
        self.attentions = attention_layers(backend.module)
        configs = layer_configs(config.model)
        self.observers = {
            kind: {
                number: _observer(backend, config.model, kind)
                for number in self.attentions
                if kind in compared_maps(configs[number])
            }
            for kind in COMPARED
        }
        self.measured = {kind: [kind in compared_maps(layer) for layer in configs] for kind in COMPARED}
        parts = (part for part in backend.state().parts if part.kind == WEIGHTS and part.owned)
        self.embeddings = [part for part in parts if is_head_embedding(part.name)]

    def after_step(self, trainer: Trainer) -> None:
        if not measures(trainer, self.config.validation.every_steps):
            return
        figures = spreads(self.embeddings, self.config.model, self.layout)
        for kind, observers in self.observers.items():
            if any(self.measured[kind]):
                with self._observing(observers):
                    if evaluate(trainer.backend.eval_loss, self.held_out, self.layout.device) is None:
                        return
                model = self.config.model
                gram_LNN = summed_grams(observers, model.num_layers, model.num_heads, self.layout)
                of_layers = mean_cosines(gram_LNN).tolist()
                figures[f"{kind}_similarity"] = [
                    figure if known else math.nan for figure, known in zip(of_layers, self.measured[kind], strict=True)
                ]
        trainer.metrics.write(trainer.step, dict(_named(figures)))

    @contextmanager
    def _observing(self, observers: Mapping[int, HeadConstraint]) -> Iterator[None]:
        """Let layers tell `observers` of passes without a gradient, not the constraint that they may have."""
        before = {number: attention.constraint for number, attention in self.attentions.items()}
        for number, attention in self.attentions.items():
            attention.constraint = observers.get(number)
        try:
            yield
        finally:
            for number, attention in self.attentions.items():
                attention.constraint = before[number]


def compared_maps(layer: ModelConfig) -> tuple[str, ...]:
    """The feature maps by which the heads of a layer can be compared; none where all heads do the same by definition."""
    if not layer.head_embeddings or not variant_of(layer).maps:
        return ()
    plain = not layer.attention_sinks and layer.logit_softcap is None  # weights are compared as without them
    return tuple(kind for kind in COMPARED if kind in variant_of(layer).maps and (kind != "attention" or plain))


def mean_cosines(gram_LNN: Tensor) -> Tensor:
    """The mean cosine of two different heads of each layer, (L,), from their Gram matrices; NaN for a layer of zeros."""
    inverse_LN = gram_LNN.diagonal(dim1=-2, dim2=-1).rsqrt()
    heads = gram_LNN.shape[-1]
    of_pairs_LNN = gram_LNN * inverse_LN[:, :, None] * inverse_LN[:, None]
    if heads == 1:
        return torch.full(gram_LNN.shape[:1], math.nan, dtype=gram_LNN.dtype)
    return (of_pairs_LNN.sum((-2, -1)) - heads) / (heads * (heads - 1))


def spreads(parts: Sequence[Part], model: ModelConfig, layout: Layout) -> dict[str, list[float]]:
    """Root mean square distance of each layer's head embeddings from their mean over heads, by kind; NaN where there are none.

    `parts` are what this rank owns of embeddings (N, D). A few sums are reduced over ranks.
    """
    kinds = [kind for kind in ("query", "key", "value") if kind != "key" or model.key_embedding]
    sums = torch.zeros(2, len(kinds), model.num_layers, model.head_width, dtype=torch.float64, device=layout.device)
    for part in parts:
        *_, number, _, name = part.name.split(".")
        columns = slice(part.offset[1], part.offset[1] + part.tensor.shape[1])
        rows_ND = part.tensor.detach().double()
        place = kinds.index(name.removesuffix("_embedding")), int(number), columns
        sums[0, *place] += rows_ND.sum(0)
        sums[1, *place] += rows_ND.square().sum(0)
    if layout.world_size > 1:
        dist.all_reduce(sums, group=layout.group("world"))
    mean, mean_square = sums.cpu() / model.num_heads
    found = (mean_square - mean.square()).clamp(min=0).mean(-1).sqrt()
    found[mean_square.sum(-1) == 0] = math.nan
    return {f"{kind}_embedding": of_L.tolist() for kind, of_L in zip(kinds, found, strict=True) if not of_L.isnan().all()}


def _observer(backend: Backend, model: ModelConfig, kind: str) -> HeadConstraint:
    observer = HeadConstraint(backend.layers, model.head_width, kind, "continuous", ROWS)
    observer.training = False  # of passes without a gradient
    return observer


def _named(figures: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, Figure]]:
    """Each figure's mean over the layers that have it, and its layers."""
    for name, of_layers in figures.items():
        known = [figure for figure in of_layers if math.isfinite(figure)]
        if known:
            yield f"heads/{name}", math.fsum(known) / len(known)
            yield f"heads/layers/{name}", of_layers
