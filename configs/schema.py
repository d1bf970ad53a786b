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
        return f"{self.key} = {as_yaml(self.value)}: {self.allowed}"


def as_yaml(value: object) -> str:
    """A field's value as a configuration writes it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


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
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32",
        description="bf16 keeps fp32 master weights; gradients are accumulated and summed over ranks in fp32. fp8 is bf16 with "
        "matrix products in float8, on GPUs that have them, with torchao installed; backend fsdp only",
    )
    gradient_clipping: float = Field(1.0, ge=0, description="Largest global gradient norm; 0: no clipping")
    recompute_activations: bool = Field(False, description="Recompute each block in the backward pass to save memory")
    compile: bool = Field(False, description="torch.compile for each block; backend fsdp only")
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


class GHAConfig(Section):
    """Grouped Head Attention (arXiv 2305.14380)."""

    stage: Literal["off", "constrain", "vote", "schedule"] = Field(
        "off",
        description="constrain: group heads and constrain them while training; vote: train nothing, let batches vote which "
        "heads stay; schedule: constrain, vote, cut the heads, train on (docs/gha.md)",
    )
    feature_map: Literal["value", "attention", "output"] = Field(
        "value",
        description="What of a head is compared: its values, its attention weights, or its output before the projection",
    )
    groups: int | None = Field(
        None, ge=2, le=2**10, description="Groups of heads in each layer; null: chosen by silhouette at the first grouping"
    )
    max_groups: int = Field(8, ge=2, le=2**10, description="Most groups that are tried where groups is null")
    regroup_every: int = Field(1, ge=1, description="Steps between groupings; 1: at every batch, as the paper does")
    gram_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the running Gram matrices that a step keeps; 0: groups follow the last batch alone",
    )
    loss: Literal["continuous", "categorical"] = Field(
        "continuous", description="Cosines to and between group centres, or a classifier of heads into groups"
    )
    alpha: float = Field(0.03, ge=0, description="Weight of likeness within groups; the constraint is a mean over layers")
    beta: float = Field(0.01, ge=0, description="Weight of difference between groups")
    warmup_steps: int = Field(0, ge=0, description="Steps in which alpha and beta rise from zero")
    end_step: int | None = Field(
        None, ge=1, description="Step after which heads are not constrained any more; null: none, or the vote"
    )
    attention_rows: int = Field(
        16,
        ge=0,
        description="feature_map attention: queries of each sequence whose weights are compared, evenly spaced; 0: all",
    )
    converged_shift: float | None = Field(
        None, gt=0, description="schedule: vote once the mean shift of group centres has been below this; null: at vote_at_step"
    )
    converged_groupings: int = Field(
        100, ge=1, description="schedule: for so many groupings one after the other, once alpha and beta have risen"
    )
    vote_at_step: int | None = Field(None, ge=1, description="schedule: vote after this step at the latest")
    vote_batches: int | None = Field(None, ge=1, description="Batches that vote, a ballot each; null: one epoch")
    ballot: Literal["votes", "scores"] = Field(
        "votes", description="A batch gives the best head of each group one vote, or every head its score"
    )
    heads_per_group: int = Field(1, ge=1, le=2**10, description="Heads that stay for each group")

    def faults(self) -> Iterator[Fault]:
        if self.end_step is not None and self.end_step <= self.warmup_steps:
            yield Fault("end_step", self.end_step, f"must be above warmup_steps ({self.warmup_steps})")
        if self.stage == "schedule" and self.vote_at_step is None:
            yield Fault("vote_at_step", None, "stage schedule needs it: the step after which it votes at the latest")


class ParallelConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="DeepSpeed ZeRO: 0 replicates (fp32 only), 1 shards optimizer state, 2 gradients too, 3 parameters too; "
        "backend deepspeed only",
    )
    replicate: int = Field(
        1,
        ge=1,
        le=2**16,
        description="Hybrid sharding: so many replicas of the model, each sharded over data-parallel ranks / replicate "
        "neighbours; backend fsdp only",
    )
    cpu_offload: bool = Field(
        False,
        description="Keep in CPU memory: the optimizer's state and step (deepspeed, zero_stage 1 to 3), parameters and "
        "gradients too (fsdp)",
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
    pipeline: int = Field(
        1,
        ge=1,
        le=2**10,
        description="Pipeline parallelism: so many stages, each with some of the layers; backend deepspeed, zero_stage 0 or 1",
    )
    pipeline_balance: Literal["parameters", "time"] = Field(
        "parameters",
        description="What stages have equal shares of: parameters, or measured time of forward and backward, which differs by "
        "run; a run that goes on keeps its stages",
    )
    timeout_minutes: float = Field(
        30,
        gt=0,
        le=10_000,
        description="A run in which nothing has moved for so long ends with a report of where each rank stands",
    )
    lost_after_seconds: float = Field(
        30, ge=1, le=3600, description="A process that has given no sign of life for so long is lost, and the run ends"
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

    backend: Literal["deepspeed", "fsdp"] = Field(
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


def cross_faults(sections: dict[str, Section], backend: object, world_size: int) -> Iterator[Fault]:
    """Rules between sections, for those of `sections` that are valid by themselves."""
    model, data, training = sections.get("model"), sections.get("data"), sections.get("training")
    parallel, schedule = sections.get("parallel"), sections.get("schedule")
    if isinstance(model, ModelConfig) and isinstance(data, DataConfig):
        longest = model.max_position_embeddings
        if longest is not None and data.sequence_length > longest:
            yield Fault("data.sequence_length", data.sequence_length, f"at most model.max_position_embeddings ({longest})")
    if isinstance(parallel, ParallelConfig):
        yield from _engine_faults(parallel, backend)
        yield from _layout_faults(parallel, training, world_size)
        if parallel.pipeline == 1 and parallel.pipeline_balance == "time":
            yield Fault("parallel.pipeline_balance", "time", "only parallel.pipeline above 1 has a use for it; leave it out")
        if isinstance(model, ModelConfig) and parallel.pipeline > model.num_layers:
            yield Fault("parallel.pipeline", parallel.pipeline, f"at most model.num_layers ({model.num_layers})")
    if isinstance(training, TrainingConfig):
        if isinstance(parallel, ParallelConfig):
            yield from _precision_faults(training, parallel, data, backend)
        if isinstance(schedule, ScheduleConfig):
            yield from _schedule_faults(training, schedule)
    gha = sections.get("gha")
    if isinstance(gha, GHAConfig) and gha.stage != "off":
        yield from _grouping_faults(gha, model, training)


def _engine_faults(parallel: ParallelConfig, backend: object) -> Iterator[Fault]:
    """Fields of `parallel` that this backend has no use for, or not with one another."""
    if backend == "fsdp":
        for name in ("zero_stage", "pipeline", "pipeline_balance"):
            if getattr(parallel, name) != ParallelConfig.model_fields[name].default:
                yield Fault(
                    f"parallel.{name}", getattr(parallel, name), "only backend deepspeed has it, not fsdp; leave it out"
                )
        return
    if parallel.replicate > 1:
        yield Fault("parallel.replicate", parallel.replicate, "only backend fsdp has it, not deepspeed; leave it out")
    if parallel.pipeline > 1 and parallel.zero_stage > 1:
        yield Fault("parallel.zero_stage", parallel.zero_stage, "0 or 1 with parallel.pipeline: stages keep whole gradients")
    if parallel.cpu_offload and parallel.zero_stage == 0:
        yield Fault("parallel.cpu_offload", True, "needs parallel.zero_stage 1, 2 or 3: stage 0 has no optimizer of its own")
    if parallel.cpu_offload and parallel.pipeline > 1:
        yield Fault("parallel.cpu_offload", True, "not together with parallel.pipeline")


def _layout_faults(parallel: ParallelConfig, training: Section | None, world_size: int) -> Iterator[Fault]:
    """How processes, layout and batch divide."""
    tensor, stages = parallel.tensor, parallel.pipeline
    names = ["tensor"] * (tensor > 1) + ["pipeline"] * (stages > 1)
    if world_size % (tensor * stages):
        sizes, text = {"tensor": tensor, "pipeline": stages}, f"must divide the number of processes ({world_size})"
        if len(names) == 1:
            yield Fault(f"parallel.{names[0]}", sizes[names[0]], text)
        else:
            yield Fault("parallel.tensor", tensor, f"times parallel.pipeline ({tensor} * {stages}) {text}")
        return
    data_size = world_size // (tensor * stages)
    if data_size % parallel.replicate:
        yield Fault("parallel.replicate", parallel.replicate, f"must divide the data-parallel ranks ({data_size})")
    if not isinstance(training, TrainingConfig):
        return
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch % (micro * data_size):
        processes = " / ".join(["processes", *(f"parallel.{name}" for name in names)])
        numbers = " / ".join([f"{micro} * {world_size}", *(str(size) for size in (tensor, stages) if size > 1)])
        yield Fault("training.global_batch_size", batch, f"must be a multiple of micro_batch_size * {processes} ({numbers})")
    elif batch // (micro * data_size) < stages:
        yield Fault(
            "training.global_batch_size",
            batch,
            f"at least parallel.pipeline ({stages}) micro-batches for each pipeline ({micro} * {data_size} samples at a time), "
            "else stages never work at the same time",
        )


def _precision_faults(
    training: TrainingConfig, parallel: ParallelConfig, data: Section | None, backend: object
) -> Iterator[Fault]:
    if backend == "deepspeed":
        if training.precision == "bf16" and parallel.zero_stage == 0:
            yield Fault(
                "parallel.zero_stage", 0, "1, 2 or 3 with precision bf16: DeepSpeed keeps no fp32 master weights at stage 0"
            )
        if training.precision == "fp8":
            yield Fault("training.precision", "fp8", "only backend fsdp has it, not deepspeed; take bf16")
        if training.compile:
            yield Fault("training.compile", True, "only backend fsdp has it, not deepspeed; leave it out")
    elif training.precision == "fp8":
        if parallel.tensor > 1:
            yield Fault("training.precision", "fp8", "not together with parallel.tensor; take bf16")
        micro = training.micro_batch_size
        if isinstance(data, DataConfig) and micro * data.sequence_length % 16:
            wanted = f"times data.sequence_length ({data.sequence_length}) must be a multiple of 16 with precision fp8"
            yield Fault("training.micro_batch_size", micro, wanted)


def _grouping_faults(gha: GHAConfig, model: Section | None, training: Section | None) -> Iterator[Fault]:
    if isinstance(model, ModelConfig):
        name, groups = ("groups", gha.groups) if gha.groups is not None else ("max_groups", gha.max_groups)
        if groups >= model.num_heads:
            yield Fault(f"gha.{name}", groups, f"must be below model.num_heads ({model.num_heads})")
        elif gha.stage != "constrain" and groups * gha.heads_per_group >= model.num_heads:
            wanted = f"times gha.{name} ({groups}) must be below model.num_heads ({model.num_heads})"
            yield Fault("gha.heads_per_group", gha.heads_per_group, wanted)
    if isinstance(training, TrainingConfig) and gha.stage == "schedule" and (gha.vote_at_step or 0) >= training.steps:
        yield Fault("gha.vote_at_step", gha.vote_at_step, f"must be below training.steps ({training.steps})")


def _schedule_faults(training: TrainingConfig, schedule: ScheduleConfig) -> Iterator[Fault]:
    after_warmup = training.steps - schedule.warmup_steps
    if after_warmup <= 0:
        yield Fault("schedule.warmup_steps", schedule.warmup_steps, f"must be below training.steps ({training.steps})")
    elif (schedule.decay_steps or 0) > after_warmup:
        yield Fault("schedule.decay_steps", schedule.decay_steps, f"at most training.steps - warmup_steps ({after_warmup})")
