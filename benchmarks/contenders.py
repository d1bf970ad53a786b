"""What benchmarks of attention variants compare: configurations with one of `variants_of` each, and of equal cost.

Fields that a variant needs and that nothing sets get usual values.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from launch.common import RULES
from launch.contenders import with_contender
from model.costs.solve import What, match
from model.faults import model_faults
from pretrain.matching import fits, vocabulary_of, with_changes


def load_contender(path: str, overrides: Sequence[str], name: str) -> Config:
    """The configuration with a contender's model. UserError if it cannot have it."""
    return load_config(path, with_contender(path, overrides, name), [model_faults], world_size=1)


def equal(configs: dict[str, Config], what: What) -> dict[str, Config]:
    """All with models that cost what the first one's does; says how. UserError for one that cannot."""
    first = next(iter(configs.values()))
    vocabulary = vocabulary_of(first)
    target, equals = first.resolved(vocabulary).model, {}
    for name, config in configs.items():
        try:
            found = match(config.resolved(vocabulary).model, target, what, config.row_length, fits=fits(config, RULES))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        if found.changes:
            print(f"{name}: {found.words()}", flush=True)
        equals[name] = with_changes(config, found)
    return equals
