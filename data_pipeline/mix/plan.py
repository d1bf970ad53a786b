"""The order in which a run takes its samples from its sources, computed from their sizes alone. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.schema import DataConfig, TrainingConfig
from data_pipeline.mix.blend import Blend, Phase
from data_pipeline.mix.order import SampleOrder


@dataclass(frozen=True)
class Usage:
    """What a run takes of a source in its first steps."""

    label: str
    samples: int
    share: float  # of the samples of all sources
    epochs: float


class Plan:
    """Sources, their weights over the run, and the samples that are left out."""

    def __init__(self, data: DataConfig, training: TrainingConfig, samples_per_epoch: Sequence[int], seed: int = 0) -> None:
        """`samples_per_epoch` of each source. `seed` decides the order inside a batch, which no method here depends on."""
        self.labels, self.sizes = [source.label for source in data.parts], samples_per_epoch
        self.phases = phases(data, samples_per_epoch)
        self.blend = Blend(self.phases, training.global_batch_size, seed)
        self.order = SampleOrder(training.skip_samples)
        self._batch = training.global_batch_size

    def usage(self, step: int) -> list[Usage]:
        """What the first `step` steps take of each source. Samples that are left out count, too: they are used up."""
        counts = self.blend.counts_after(self.order.number(step * self._batch))
        total = max(1, sum(counts))
        return [
            Usage(label, count, count / total, count / size)
            for label, count, size in zip(self.labels, counts, self.sizes, strict=True)
        ]


def phases(data: DataConfig, samples_per_epoch: Sequence[int]) -> list[Phase]:
    """The shares of the sources over the run."""
    weights = [
        source.weight or (source.epochs or 0.0) * size for source, size in zip(data.parts, samples_per_epoch, strict=True)
    ]
    found = {0: weights}
    for phase in data.schedule:
        found[phase.from_step] = [phase.weights.get(source.label, 0.0) for source in data.parts]
    return [Phase(step, tuple(weight / sum(of_phase) for weight in of_phase)) for step, of_phase in found.items()]
