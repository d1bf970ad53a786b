"""What benchmarks of attention variants compare: configurations with one of `variants_of` each, and of equal cost.

Fields that a variant needs and that nothing sets get usual values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config, ModelConfig
from launch.common import RULES
from model.attention.faults import attention_faults
from model.attention.registry import attention_variant
from model.costs.solve import What, match
from model.faults import model_faults
from pretrain.matching import fits, vocabulary_of, with_changes


def _query_rank(model: ModelConfig) -> int:
    """Factors of queries are few (arXiv 2501.06425); queries beside embeddings are narrow; others are half of the model."""
    if _reads(model, "key_rank"):
        return 6
    return model.head_width if _reads(model, "head_embeddings") else max(1, model.hidden_size // 2)


NEEDED: dict[str, Callable[[ModelConfig], int]] = {
    "num_kv_heads": lambda model: max(d for d in range(1, max(1, model.num_heads // 4) + 1) if model.num_heads % d == 0),
    "query_rank": _query_rank,
    "key_rank": lambda model: 2,
    "value_rank": lambda model: 2,
    "latent_dim": lambda model: 4 * model.head_width,  # as arXiv 2405.04434
    "num_latents": lambda model: 2,
    "rope_dim": lambda model: 2 * max(1, model.head_width // 4),
}


def with_contender(path: str, overrides: Sequence[str], name: str) -> list[str]:
    """The overrides, and those that make a contender of a configuration."""
    attention, *fields = name.split(":")
    own = [*overrides, f"--model.attention={attention}", *(f"--model.{field}" for field in fields)]
    model = load_config(path, own, world_size=1).model
    return [*own, *(f"--model.{field}={value}" for field, value in needed(model).items())]


def load_contender(path: str, overrides: Sequence[str], name: str) -> Config:
    """The configuration with a contender's model. UserError if it cannot have it."""
    return load_config(path, with_contender(path, overrides, name), [model_faults], world_size=1)


def needed(model: ModelConfig) -> dict[str, int]:
    """Usual values of fields that the model's variants need and that are not set."""
    lacking = [fault.key for fault in attention_faults(model) if fault.value is None]
    return {field: NEEDED[field](model) for field in lacking if field in NEEDED}


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


def _reads(model: ModelConfig, field: str) -> bool:
    return any(field in attention_variant(name).options for name in model.pattern)
