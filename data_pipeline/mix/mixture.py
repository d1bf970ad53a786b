"""What a run trains on: one source, or several that are blended sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.errors import UserError
from configs.schema import Config, SourceConfig
from data_pipeline.mix.blend import Blend
from data_pipeline.mix.order import OrderedSamples
from data_pipeline.mix.plan import Plan
from data_pipeline.read.dataset import TokenDataset
from data_pipeline.read.loader import Samples


class Mixture:
    """Samples of several sources in the order of a blend."""

    def __init__(self, sources: Sequence[Samples], blend: Blend) -> None:
        """All sources have samples of the same length, made with one tokenizer."""
        self._sources, self._blend = sources, blend
        self.samples_per_epoch = sum(source.samples_per_epoch for source in sources)

    def prepare_range(self, first: int, last: int) -> None:
        """As `TokenDataset.prepare_range`, of each source that has samples there."""
        ranges = zip(self._blend.counts_before(first), self._blend.counts_after(last), strict=True)
        for source, (begin, end) in zip(self._sources, ranges, strict=True):
            if begin < end:
                source.prepare_range(begin, end)

    def sample(self, number: int) -> np.ndarray:
        source, own = self._blend.place(number)
        return self._sources[source].sample(own)


@dataclass(frozen=True)
class Origin:
    """Where a training sample comes from."""

    step: int | None  # that takes it, counted from 0, even if the run ends before; None if it is left out
    source: SourceConfig
    number: int  # in the source
    epoch: int  # of the source
    documents: list[int]  # numbers in the source's train split
    tokens: np.ndarray  # int64 [sequence_length + 1]


def origin(config: Config, number: int) -> Origin:
    """Of the sample with this number. UserError if a source's files are not what was prepared."""
    sources = training_sources(config)
    plan = _plan(config, sources)
    place, own = plan.blend.place(number)
    source = sources[place]
    source.prepare_range(own, own + 1)
    turn = plan.order.turn(number)
    step = None if turn is None else turn // config.training.global_batch_size
    epoch = own // source.samples_per_epoch
    found = Origin(step, config.data.parts[place], own, epoch, source.documents(own), source.sample(own))
    source.release()
    return found


def training_sources(config: Config) -> list[TokenDataset]:
    """The sources of a resolved configuration. UserError if the files of one are not what was prepared."""
    data = config.data
    if data.streams:
        raise UserError("data.stream: its samples can only be read in their order; prepare the text with launch/prepare.py")
    length, seed = data.sequence_length, config.run.seed
    return [TokenDataset(source.path, "train", length, seed, packing=data.packing) for source in data.parts]


def training_samples(config: Config, opened: Sequence[TokenDataset] | None = None) -> OrderedSamples:
    """What a resolved configuration trains on, in its order; `opened` are its sources, if they have been opened already."""
    sources = training_sources(config) if opened is None else opened
    plan = _plan(config, sources)
    samples: Samples = sources[0] if len(sources) == 1 else Mixture(sources, plan.blend)
    _check_left_out(config, sources, plan)
    return OrderedSamples(samples, plan.order)


def _check_left_out(config: Config, sources: Sequence[TokenDataset], plan: Plan) -> None:
    """UserError if two steps, which are prepared together, leave out more than an epoch of a source between their samples.

    The data set would prepare the orders of all epochs between.
    """
    for first, last in plan.order.spans(2 * config.training.global_batch_size, config.training.global_batch_size):
        ranges = zip(plan.blend.counts(first), plan.blend.counts(last), strict=True)
        for source, (begin, end) in zip(sources, ranges, strict=True):
            if end - begin > source.samples_per_epoch + 2 * config.training.global_batch_size:
                epoch = f"more than an epoch of {source.folder}, which has {source.samples_per_epoch:,} samples"
                raise UserError(f"training.skip_samples: from sample {first} to {last} it leaves out {epoch}")


def _plan(config: Config, sources: Sequence[TokenDataset]) -> Plan:
    return Plan(config.data, config.training, [source.samples_per_epoch for source in sources], config.run.seed)
