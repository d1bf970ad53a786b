"""Section `training`: steps, batches and precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from configs.schema.base import Fault, Section


class AverageConfig(Section):
    """An average of the weights beside them (pretrain/loop/averaging.py): none, or one of the two."""

    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Checkpoints hold an exponential moving average of the weights, too: after the n-th step "
        "decay' * average + (1 - decay') * weights, where decay' is min(decay, (n - 1) / (n + 8)); null: none",
    )
    last: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="Checkpoints hold what the average of the weights of so many saves takes: their own, and the last ones at "
        "multiples of checkpoint.every_steps; null: none",
    )


LAST_SAMPLE = 10**15


def _ranges(value: object) -> object:
    def is_range(bounds: object) -> bool:
        numbers = isinstance(bounds, list) and len(bounds) == 2 and all(type(bound) is int for bound in bounds)
        return numbers and 0 <= bounds[0] < bounds[1] <= LAST_SAMPLE  # type: ignore[index]

    if not isinstance(value, list) or not all(map(is_range, value)):
        raise PydanticCustomError(
            "ranges", "must be a list of ranges [from, to] with 0 <= from < to <= 10^15, such as [[0, 8]]"
        )
    return value


SampleRanges = Annotated[list[list[int]], BeforeValidator(_ranges)]  # [from, to]: from <= number < to


class SkipConfig(Section):
    """Steps that leave no trace in the model (docs/failures.md)."""

    nonfinite: int = Field(
        10,
        ge=0,
        le=10**9,
        description="Steps in a row that are skipped because their loss or gradient norm is not finite; one more ends the run. "
        "0: the first one ends it",
    )
    spike_sigma: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Skip steps whose loss or gradient norm is more than so many standard deviations above the mean of the "
        "last 128 steps; null: skip none for that",
    )


class MaskedConfig(Section):
    """Objective masked: masked language modelling."""

    share: float = Field(0.15, gt=0, le=1, description="Share of each sample's tokens that are predicted; masked only")
    replaced: float = Field(0.8, ge=0, le=1, description="Share of these that the mask token replaces; masked only")
    random: float = Field(
        0.1, ge=0, le=1, description="Share of these that a random token replaces; all others stay as they are; masked only"
    )
    whole_words: bool = Field(False, description="Choose words, of which all tokens are predicted; masked only")
    token: str = Field("<|mask|>", description="Text of the mask token in tokenizer.json; masked only")

    def faults(self) -> Iterator[Fault]:
        if self.replaced + self.random > 1:
            yield Fault("random", self.random, f"at most 1 - replaced ({1 - self.replaced:g})")


class SpansConfig(Section):
    """Objective spans: span corruption."""

    share: float = Field(0.15, gt=0, lt=1, description="Share of each sample's tokens that are predicted; spans only")
    mean_length: float = Field(3.0, ge=1, le=2**20, description="Mean length of the spans that they form; spans only")
    sentinel: str = Field(
        "<|sentinel_{}|>", description="Text of the sentinel tokens in tokenizer.json; {} is their number from 0; spans only"
    )

    def faults(self) -> Iterator[Fault]:
        if "{}" not in self.sentinel:
            yield Fault("sentinel", self.sentinel, "needs {} where the number is, such as <|sentinel_{}|>")

    def counts(self, length: int) -> tuple[int, int]:
        """How many of `length` ≥ 2 tokens are predicted, and how many spans they form; as in T5 (arXiv 1910.10683)."""
        corrupted = min(max(round(length * self.share), 1), length - 1)
        return corrupted, min(max(round(corrupted / self.mean_length), 1), corrupted, length - corrupted)


class TrainingConfig(Section):
    steps: int = Field(ge=1, le=10**9, description="Optimizer steps of the run")
    global_batch_size: int = Field(
        ge=1,
        le=2**24,
        description="Samples per optimizer step; each rank accumulates global_batch_size / (micro_batch_size * data-parallel "
        "ranks) micro-batches",
    )
    micro_batch_size: int = Field(ge=1, le=2**24, description="Samples per forward and backward pass on one rank")
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32",
        description="bf16 keeps fp32 master weights; gradients are accumulated and summed over ranks in fp32. fp8 is bf16 with "
        "matrix products in float8, on GPUs that have them, with torchao installed; backend fsdp only",
    )
    gradient_clipping: float = Field(1.0, ge=0, le=1e6, description="Largest global gradient norm; 0: no clipping")
    z_loss: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight of the mean of (log Z)², with Z the sum of e to the logits, in the loss; PaLM: 1e-4",
    )
    recompute_activations: bool = Field(False, description="Recompute each block in the backward pass to save memory")
    compile: bool = Field(False, description="torch.compile for each block; backend fsdp only")
    deterministic: bool = Field(True, description="Same seed and layout give bitwise the same losses; somewhat slower on GPUs")
    skip: SkipConfig = SkipConfig()
    skip_samples: SampleRanges = Field(
        [],
        description="Training samples to leave out, by their numbers in the order of the run: [from, to] leaves out those with "
        "from <= number < to",
    )
    average: Annotated[AverageConfig, BeforeValidator(lambda given: {} if given is None else given)] = AverageConfig()
    objective: str = Field(
        "next_token",
        description="What the model learns; next_token: each token from those before it; masked: some tokens from all others, "
        "which needs a model that sees both sides; spans: what sentinels stand for in a text before it (docs/objectives.md)",
    )
    masked: MaskedConfig = MaskedConfig()
    spans: SpansConfig = SpansConfig()

    def row_length(self, sequence_length: int) -> int:
        """The tokens that a model computes for a sample: with objective spans the text, and each sentinel twice."""
        return sequence_length + (2 * self.spans.counts(sequence_length)[1] if self.objective == "spans" else 0)

    def faults(self) -> Iterator[Fault]:
        if self.average.decay is not None and self.average.last is not None:
            yield Fault("average.last", self.average.last, "one average only: set it or training.average.decay to null")
        for name in ("masked", "spans"):
            for fault in getattr(self, name).faults():
                yield Fault(f"{name}.{fault.key}", fault.value, fault.allowed)
