"""Every field of a run's configuration: type, default, allowed values, meaning.

One frozen section per concern. A field's description is its documentation: `--help` and `docs/configuration.md` are made from
it. `faults()` of a section yields what the types alone cannot say; rules that join two sections live in `cross_faults`, those
of one attention variant in model/attention/registry.py. Nothing here imports torch, so a wrong file is reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a configuration: the field's dotted name, its value and what is allowed."""

    key: str
    value: Any
    allowed: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.allowed}"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def faults(self) -> Iterator[Fault]:
        """Rules between fields of this section; keys are relative to it."""
        yield from ()


class RunConfig(Section):
    folder: str = Field(min_length=1, description="Where the run writes checkpoints, metrics, TensorBoard logs and its config")
    seed: int = Field(1234, ge=0, lt=2**31, description="Seed of initial weights, data order and dropout")


class ModelConfig(Section):
    attention: str = Field("mhe_add", description="Attention variant; docs/attention.md describes each")
    hidden_size: int = Field(ge=1, le=2**18, description="Width of the residual stream")
    num_layers: int = Field(ge=1, le=2**14, description="Number of transformer blocks")
    num_heads: int = Field(ge=1, le=2**16, description="Query heads of one attention layer")
    head_dim: int | None = Field(
        None,
        ge=1,
        le=2**16,
        description="Width of one head; null: hidden_size / num_heads. num_heads * head_dim may differ from hidden_size",
    )
    num_kv_heads: int | None = Field(
        None, ge=1, le=2**16, description="Key/value heads of gqa; must divide num_heads; gqa only"
    )
    embedding_position: Literal["before", "after"] = Field(
        "after", description="mhe_* with rope: head embeddings enter before or after the rotation (docs/attention.md)"
    )
    key_embedding: bool = Field(
        True,
        description="mhe_*: learn e^K; false leaves it out. In mhe_add its gradient is exactly zero and outputs are the same "
        "without it, unless embedding_position is before",
    )
    attention_kernel: Literal["auto", "math", "sdpa", "shared_scores"] = Field(
        "auto",
        description="How attention is computed, equal but for rounding: math spells the formula out, sdpa is torch's fused "
        "attention, shared_scores one softmax matrix for all heads of mhe_add (docs/attention.md)",
    )
    attend_across_documents: bool = Field(
        True, description="Attention sees earlier documents of the same sample; false: tokens see their own document only"
    )
    end_of_document: int | None = Field(
        None, ge=0, description="Token id after which a document begins; null: the tokenizer's, if attention needs it"
    )
    ffn_hidden_size: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="Inner width of the MLP; null: 4 * hidden_size (gelu), 8/3 * hidden_size rounded up to 64 (swiglu)",
    )
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="MLP activation")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation before attention, MLP and the output")
    norm_epsilon: float = Field(1e-5, gt=0, description="Added to the variance by the norm")
    position: Literal["learned", "rope", "alibi", "none"] = Field("learned", description="How positions enter the model")
    max_position_embeddings: int | None = Field(
        None, ge=1, le=2**24, description="Longest sequence of learned positions; null: data.sequence_length"
    )
    rope_theta: float = Field(10000.0, gt=0, description="Base of rotary frequencies")
    bias: bool = Field(True, description="Biases on linear layers and LayerNorm")
    tie_embeddings: bool = Field(True, description="Output projection shares the token embedding's weight")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout after embeddings, attention output and MLP")
    init_std: float = Field(
        0.02,
        gt=0,
        description="Standard deviation of initial weights; projections into the residual stream: / sqrt(2 * num_layers)",
    )
    vocab_size: int | None = Field(
        None, ge=1, le=2**24, description="Rows of the token embedding; null: the tokenizer's size rounded up to vocab_multiple"
    )
    vocab_multiple: int = Field(
        64, ge=1, le=2**20, description="Vocabulary is padded to a multiple of this when vocab_size is null"
    )

    @property
    def head_width(self) -> int:
        """head_dim after its default."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def ffn_width(self) -> int:
        """ffn_hidden_size after its default."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return 4 * self.hidden_size if self.activation == "gelu" else 64 * math.ceil(8 * self.hidden_size / 3 / 64)

    def faults(self) -> Iterator[Fault]:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            yield Fault("num_heads", self.num_heads, f"must divide hidden_size ({self.hidden_size}) unless head_dim is given")
        if self.position == "rope" and self.head_width % 2 and (self.head_dim or self.hidden_size % self.num_heads == 0):
            yield Fault("head_dim", self.head_width, "must be even with position rope (channels rotate in pairs)")
        if self.end_of_document is not None and self.attend_across_documents:
            yield Fault(
                "end_of_document", self.end_of_document, "only attend_across_documents false has a use for it; leave it out"
            )
        if self.end_of_document is not None and self.vocab_size is not None and self.end_of_document >= self.vocab_size:
            yield Fault("end_of_document", self.end_of_document, f"must be below vocab_size ({self.vocab_size})")
        if self.max_position_embeddings is not None and self.position != "learned":
            yield Fault("max_position_embeddings", self.max_position_embeddings, "only position learned has it; leave it out")


class DataConfig(Section):
    path: str = Field(
        min_length=1, description="Folder written by launch/prepare.py: token files, tokenizer.json, manifest.json"
    )
    sequence_length: int = Field(ge=1, le=2**24, description="Tokens of one training sample")


class TrainingConfig(Section):
    steps: int = Field(ge=1, le=10**9, description="Optimizer steps of the whole run")
    global_batch_size: int = Field(
        ge=1,
        le=2**24,
        description="Samples of one step; divided by micro_batch_size * data-parallel ranks: accumulated micro-batches",
    )
    micro_batch_size: int = Field(ge=1, le=2**24, description="Samples of one forward and backward pass on one rank")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 keeps fp32 master weights; gradients are accumulated and summed over ranks in fp32"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="Largest global gradient norm; 0: no clipping")
    recompute_activations: bool = Field(False, description="Recompute each block in the backward pass to save memory")
    deterministic: bool = Field(
        True, description="Same seed and layout give the same losses bit for bit; on GPUs somewhat slower"
    )


class OptimizerConfig(Section):
    lr: float = Field(3e-4, gt=0, description="Peak learning rate of AdamW")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment")
    epsilon: float = Field(1e-8, gt=0, description="Added to the denominator")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay; none on norms, biases and head embeddings")


class ScheduleConfig(Section):
    kind: Literal["cosine", "wsd"] = Field(
        "cosine", description="cosine: decay from warmup on; wsd: warmup, stable, linear decay"
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warmup to the peak; fewer than training.steps")
    decay_steps: int | None = Field(
        None,
        ge=1,
        description="Length of wsd's final decay; null: a tenth of training.steps, at most what warmup leaves; wsd only",
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak")

    def faults(self) -> Iterator[Fault]:
        if self.decay_steps is not None and self.kind != "wsd":
            yield Fault("decay_steps", self.decay_steps, "only kind wsd has it; leave it out")


class ParallelConfig(Section):
    zero_stage: Literal[0, 1, 2] = Field(
        1, description="DeepSpeed ZeRO: 0 replicates (fp32 only), 1 shards optimizer state, 2 gradients too"
    )
    tensor: int = Field(
        1,
        ge=1,
        le=2**10,
        description="Tensor parallelism: this many neighbouring processes share one model, each with its part of heads, MLP "
        "channels and vocabulary (docs/tensor_parallel.md)",
    )
    sequence: bool = Field(
        False,
        description="Sequence parallelism: norms, dropout and residuals of each tensor-parallel rank see a part of the "
        "sequence; no effect at tensor 1",
    )
    mhe_gather: Literal["auto", "activations", "weights"] = Field(
        "auto",
        description="sha, mhe_*: what ranks gather to have the shared projection's outputs whole, its activations or its "
        "weights; auto: what moves fewer bytes (docs/communication.md)",
    )


class ValidationConfig(Section):
    every_steps: int = Field(100, ge=0, description="Steps between validations; 0: only after the last step")
    samples: int | None = Field(None, ge=1, description="Validation samples of each evaluation; null: the whole split")


class CheckpointConfig(Section):
    every_steps: int = Field(100, ge=0, description="Steps between checkpoints; 0: only after the last step")
    keep_last: int = Field(2, ge=1, description="How many of the newest checkpoints stay")
    keep_every: int | None = Field(
        None, ge=1, description="Checkpoints whose step is a multiple of this stay for ever; null: none"
    )


class LoggingConfig(Section):
    every_steps: int = Field(10, ge=1, description="Steps between lines on screen when it is no terminal")
    tensorboard: bool = Field(True, description="Write TensorBoard events beside metrics.jsonl")
    peak_tflops: float | None = Field(
        None, gt=0, description="Peak TFLOP/s of one device for MFU; null: known for common GPUs, else no MFU is shown"
    )


class Config(Section):
    """A whole run."""

    backend: Literal["deepspeed"] = Field("deepspeed", description="Training engine")
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def resolved(self, tokenizer_size: int, end_of_document: int | None = None) -> Config:
        """A copy in which every default that depends on other fields or on the tokenizer stands as a number."""
        model, multiple = self.model, self.model.vocab_multiple
        separates = not model.attend_across_documents
        longest = self.data.sequence_length if model.position == "learned" else None
        after_warmup = self.training.steps - self.schedule.warmup_steps
        decay_steps = max(1, min(self.training.steps // 10, after_warmup)) if self.schedule.kind == "wsd" else None
        model = model.model_copy(
            update={
                "head_dim": model.head_width,
                "ffn_hidden_size": model.ffn_width,
                "vocab_size": model.vocab_size or multiple * math.ceil(tokenizer_size / multiple),
                "max_position_embeddings": model.max_position_embeddings or longest,
                "end_of_document": end_of_document if separates and model.end_of_document is None else model.end_of_document,
            }
        )
        schedule = self.schedule.model_copy(update={"decay_steps": self.schedule.decay_steps or decay_steps})
        return self.model_copy(update={"model": model, "schedule": schedule})


def cross_faults(sections: dict[str, Section], world_size: int) -> Iterator[Fault]:
    """Rules between sections, for those of `sections` that are valid by themselves."""
    model, data, training = sections.get("model"), sections.get("data"), sections.get("training")
    parallel, schedule = sections.get("parallel"), sections.get("schedule")
    if isinstance(model, ModelConfig) and isinstance(data, DataConfig):
        longest = model.max_position_embeddings
        if longest is not None and data.sequence_length > longest:
            yield Fault("data.sequence_length", data.sequence_length, f"at most model.max_position_embeddings ({longest})")
    tensor = parallel.tensor if isinstance(parallel, ParallelConfig) else 1
    if world_size % tensor:
        yield Fault("parallel.tensor", tensor, f"must divide the number of processes ({world_size})")
    if isinstance(training, TrainingConfig):
        if world_size % tensor == 0 and training.global_batch_size % (training.micro_batch_size * world_size // tensor):
            processes = "processes" if tensor == 1 else "processes / parallel.tensor"
            numbers = f"{training.micro_batch_size} * {world_size}" + (f" / {tensor}" if tensor > 1 else "")
            yield Fault(
                "training.global_batch_size",
                training.global_batch_size,
                f"must be a multiple of micro_batch_size * {processes} ({numbers})",
            )
        if isinstance(parallel, ParallelConfig) and training.precision == "bf16" and parallel.zero_stage == 0:
            yield Fault(
                "parallel.zero_stage", 0, "1 or 2 with precision bf16: DeepSpeed keeps no fp32 master weights at stage 0"
            )
        if isinstance(schedule, ScheduleConfig):
            if schedule.warmup_steps >= training.steps:
                yield Fault("schedule.warmup_steps", schedule.warmup_steps, f"must be below training.steps ({training.steps})")
            elif (schedule.decay_steps or 0) > training.steps - schedule.warmup_steps:
                yield Fault(
                    "schedule.decay_steps",
                    schedule.decay_steps,
                    f"at most training.steps - warmup_steps ({training.steps - schedule.warmup_steps})",
                )
