"""The complete configuration of a run, and how its open defaults are resolved."""

from __future__ import annotations

import math

from pydantic import Field

from configs.schema.base import Section
from configs.schema.checkpoint import CheckpointConfig
from configs.schema.data import DataConfig
from configs.schema.gha import GHAConfig
from configs.schema.logging import LoggingConfig
from configs.schema.model import ModelConfig
from configs.schema.optimizer import OptimizerConfig
from configs.schema.parallel import ParallelConfig
from configs.schema.run import RunConfig
from configs.schema.schedule import ScheduleConfig
from configs.schema.training import TrainingConfig
from configs.schema.validation import ValidationConfig


class Config(Section):
    """A complete run."""

    backend: str = Field(
        "deepspeed", description="Training engine: DeepSpeed (ZeRO, pipelines) or torch's fully sharded data parallelism"
    )
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    gha: GHAConfig = GHAConfig()
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def row_length(self) -> int:
        """The tokens that the model computes for a sample."""
        return self.training.row_length(self.data.sequence_length)

    def resolved(self, tokenizer_size: int, end_of_document: int | None = None) -> Config:
        """A copy in which defaults that depend on other fields or on the tokenizer are replaced by their values."""
        model, multiple = self.model, self.model.vocab_multiple
        across = model.attend_across_documents
        if across is None:
            across = not self.data.keeps_documents_apart
        longest = self.row_length if model.position == "learned" else None
        after_warmup = self.training.steps - self.schedule.warmup_steps
        decay_steps = max(1, min(self.training.steps // 10, after_warmup)) if self.schedule.kind == "wsd" else None
        model = model.model_copy(
            update={
                "head_dim": model.head_width,
                "ffn_hidden_size": model.ffn_width,
                "vocab_size": model.vocab_size or multiple * math.ceil(tokenizer_size / multiple),
                "max_position_embeddings": model.max_position_embeddings or longest,
                "linformer_tokens": model.linformer_tokens or (self.row_length if model.linformer_length else None),
                "attend_across_documents": across,
                "end_of_document": end_of_document if not across and model.end_of_document is None else model.end_of_document,
            }
        )
        schedule = self.schedule.model_copy(update={"decay_steps": self.schedule.decay_steps or decay_steps})
        return self.model_copy(update={"model": model, "schedule": schedule})
