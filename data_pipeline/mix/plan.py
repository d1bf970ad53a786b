"""The order in which a run takes its samples from its sources, computed from their sizes alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from configs.schema import DataConfig, TrainingConfig
from data_pipeline.mix.blend import Blend, Phase
from data_pipeline.mix.order import SampleOrder
from data_pipeline.read.packed import samples_per_epoch


@dataclass(frozen=True)
class Usage:
    """What a run takes of a source in its first steps."""

    label: str
    samples: int
    share: float  # of the samples of all sources
    epochs: float


class Plan:
    """Sources, their shares over the run, and the samples that are left out."""

    def __init__(self, data: DataConfig, training: TrainingConfig, samples_per_epoch: Sequence[int], seed: int = 0) -> None:
        """`samples_per_epoch` of each source. `seed` decides the order inside a batch, which `usage` does not depend on."""
        self.labels, self.sizes = [source.label for source in data.parts], samples_per_epoch
        self.order, self._batch = SampleOrder(training.skip_samples), training.global_batch_size
        shares = shares_by_step(data, samples_per_epoch)
        # A phase begins with the first sample that its first step takes.
        numbers = [self.order.number(step * self._batch) if step else 0 for step in shares]
        self.phases = [Phase(number, of_step) for number, of_step in zip(numbers, shares.values(), strict=True)]
        self.blend = Blend(self.phases, self._batch, seed)

    @classmethod
    def of(cls, data: DataConfig, training: TrainingConfig) -> Plan:
        """The plan of prepared folders whose files are sound, without opening their tokens."""
        return cls(data, training, [samples_per_epoch(source.path, data) for source in data.parts])

    def usage(self, step: int) -> list[Usage]:
        """What the first `step` steps take of each source. Samples that they leave out count, too: they are used up."""
        counts = self.blend.counts(self.order.number(step * self._batch - 1) + 1 if step else 0)
        total = max(1, sum(counts))
        return [
            Usage(label, count, count / total, count / size)
            for label, count, size in zip(self.labels, counts, self.sizes, strict=True)
        ]


def shares_by_step(data: DataConfig, samples_per_epoch: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """The shares of the sources, of the sum 1, from each step on at which they change. Equal weights give equal shares."""
    sizes = dict(zip((source.label for source in data.parts), samples_per_epoch, strict=True))
    first = {source.label: source.weight or 0.0 for source in data.parts}
    epochs = {source.label: source.epochs for source in data.parts if source.epochs is not None}
    given = {0: _weights(first, epochs, sizes)}
    given |= {phase.from_step: _weights(phase.weights, phase.epochs, sizes) for phase in data.schedule}
    found: dict[int, tuple[float, ...]] = {}
    for step, of_step in given.items():
        shares = tuple(float(weight / sum(of_step)) for weight in of_step)
        if not found or shares != next(reversed(found.values())):
            found[step] = shares
    return found


def _weights(weights: Mapping[str, float], epochs: Mapping[str, float], sizes: Mapping[str, int]) -> list[Fraction]:
    """The weights of the sources with these sizes: as given, or so that each is used so often."""
    if epochs:
        return [Fraction(repr(epochs.get(name, 0.0))) * size for name, size in sizes.items()]
    return [Fraction(repr(weights.get(name, 0.0))) for name in sizes]
