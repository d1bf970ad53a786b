"""Every field of a run's configuration: type, default, allowed values, meaning.

One frozen section per file. A field's description is its documentation: `--help` and `docs/configuration.md` are generated from
it. `faults()` of a section yields what its types cannot express. Rules between sections are in `rules.py`, those of one
attention variant in model/attention/registry.py. Nothing here imports torch, so a wrong file is reported at once.
"""

from configs.schema.base import Fault, Section, as_yaml
from configs.schema.checkpoint import CheckpointConfig
from configs.schema.config import Config
from configs.schema.data import DataConfig, SourceConfig
from configs.schema.gha import GHAConfig
from configs.schema.logging import LoggingConfig
from configs.schema.model import ModelConfig
from configs.schema.optimizer import OptimizerConfig
from configs.schema.parallel import ParallelConfig
from configs.schema.rules import cross_faults
from configs.schema.run import RunConfig
from configs.schema.schedule import ScheduleConfig
from configs.schema.stream import StreamConfig
from configs.schema.training import AverageConfig, MaskedConfig, SkipConfig, SpansConfig, TrainingConfig
from configs.schema.validation import ValidationConfig

SECTIONS: dict[str, type[Section]] = {
    name: section for name in Config.model_fields if (section := Config.section(name)) is not None
}

__all__ = [
    "SECTIONS",
    "AverageConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Fault",
    "GHAConfig",
    "LoggingConfig",
    "MaskedConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SkipConfig",
    "SourceConfig",
    "SpansConfig",
    "StreamConfig",
    "TrainingConfig",
    "ValidationConfig",
    "as_yaml",
    "cross_faults",
]
