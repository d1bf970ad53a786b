"""What models of equal cost need to know of a run: its vocabulary, and which models it can have. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from configs import launcher
from configs.load import Check
from configs.schema import Config, ModelConfig, cross_faults
from data_pipeline.read.manifest import read_manifest
from model.costs.solve import Fits, Matched


def with_changes(config: Config, found: Matched) -> Config:
    """A configuration whose model has the fields that were changed; the others stay open."""
    return config.model_copy(update={"model": config.model.model_copy(update=found.changes)})


def fits(config: Config, rules: Sequence[Check], world_size: int | None = None) -> Fits:
    """Whether a run of this configuration can have a model. `world_size` defaults to that of the launcher."""
    sections = {name: getattr(config, name) for name in Config.model_fields}
    size = launcher.world_size() if world_size is None else world_size

    def check(model: ModelConfig) -> bool:
        changed = {**sections, "model": model}
        faults = [*cross_faults(changed, size), *(fault for rule in rules for fault in rule(changed))]
        return not faults

    return check


def vocabulary_of(config: Config) -> int:
    """The rows of the run's token embedding: model.vocab_size, or what its tokenizer asks for."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if config.data.streams:
        from data_pipeline.stream.text import load_tokenizer  # here: it imports what tokenizes, which only a stream needs

        size = load_tokenizer(config.data.stream).vocab_size
    else:
        size = read_manifest(config.data.parts[0].path).vocab_size
    resolved = config.resolved(size).model.vocab_size
    assert resolved is not None
    return resolved
