"""What a run will take on a cluster: memory, time, energy, checkpoints. Torch-free until memory is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from configs.schema import Config
from model.costs.flops import executed_flops_per_token, flops_per_token
from model.costs.parameters import parameters
from pretrain.planning.cluster import Cluster
from pretrain.planning.memory import RankMemory, rank_memory
from pretrain.planning.timing import StepTime, execution_of, step_time
from pretrain.planning.traffic import transfers

SPREAD = 0.10  # of predicted over published rates, the root of the mean square of its logarithm: pretrain/planning/published.py
UNTESTED = 2.0  # how many times as wide the range is on devices without a published run
TESTED = ("a100", "h100", "h100_500w", "h200", "b200")  # what benchmarks/published_runs.yaml has
DRAWN = 0.85  # of its power limit that a device draws while it trains: an assumption
COPIED = 10e9  # bytes a second that a device copies into host memory: an assumption
WRITTEN = 2e9  # bytes a second that a node writes to a shared file system: an assumption


@dataclass(frozen=True)
class Checkpoints:
    """What checkpoints take: bytes of one, seconds that training waits for it, how many, seconds to write one."""

    bytes: int
    stall: float
    count: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A resolved configuration on so many ranks of a cluster; all else follows from these."""

    config: Config
    ranks: int
    cluster: Cluster

    @cached_property
    def parameters(self) -> Mapping[str, int]:
        """Parameters by part."""
        return parameters(self.config.model)

    @property
    def attention_share(self) -> float:
        return self.parameters["attention"] / sum(self.parameters.values())

    @property
    def tokens_per_step(self) -> int:
        """Tokens of text."""
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.config.training.steps * self.tokens_per_step

    @property
    def data_ranks(self) -> int:
        return self.ranks // (self.config.parallel.tensor * self.config.parallel.pipeline)

    @property
    def micro_batches(self) -> int:
        """Of a step, on each data-parallel rank."""
        return self.config.training.global_batch_size // (self.config.training.micro_batch_size * self.data_ranks)

    @cached_property
    def flops_per_token(self) -> float:
        """Model FLOPs of a token of text, as metrics count them."""
        row = self.config.row_length
        return flops_per_token(self.config.model, row) * row / self.config.data.sequence_length

    @cached_property
    def executed_flops_per_token(self) -> float:
        """With what attention kernels and recomputation execute."""
        row, model = self.config.row_length, self.config.model
        shares = model.attention_kernel == "shared_scores" or (model.attention_kernel == "auto" and self.cluster.device.is_cpu)
        again = flops_per_token(model, row) / 3 * execution_of(self.config).recomputed
        return (executed_flops_per_token(model, row, shares) + again) * row / self.config.data.sequence_length

    @cached_property
    def step(self) -> StepTime:
        return step_time(self.config, self.ranks, self.cluster, partial(transfers, self.config, self.ranks))

    @cached_property
    def computing(self) -> float:
        """Seconds of a step if nothing had to be sent."""
        return step_time(self.config, self.ranks, self.cluster, lambda stage: ()).total

    @cached_property
    def memory(self) -> RankMemory:
        """Of the rank that holds most."""
        return rank_memory(self.config, self.ranks, gpu=not self.cluster.device.is_cpu)

    @property
    def usable(self) -> float:
        """Bytes of a device."""
        return self.cluster.device.memory

    @property
    def over(self) -> float:
        """Bytes that do not fit; negative where all do."""
        return self.memory.total - self.usable

    @property
    def fits(self) -> bool:
        return self.over <= 0

    @property
    def tested(self) -> bool:
        """Whether the model of time has been compared with published runs on such devices."""
        return self.cluster.device.name in TESTED

    @property
    def spread(self) -> float:
        """The factor between the expected rate and either end of its range."""
        return math.exp(1.65 * SPREAD * (1 if self.tested else UNTESTED))

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens_per_step / self.step.total

    def mfu(self, tokens_per_second: float) -> float:
        precision = "fp32" if self.config.training.precision == "fp32" else "bf16"
        return tokens_per_second * self.flops_per_token / (self.ranks * self.cluster.device.peak[precision])

    @property
    def checkpoints(self) -> Checkpoints:
        """12 bytes a parameter, and an average's; each rank copies its share while training waits, and writes it beside."""
        every, average = self.config.checkpoint.every_steps, self.config.training.average
        values = 12 + (4 if average.decay is not None else 4 * ((average.last or 1) - 1))
        size = values * sum(self.parameters.values())
        copy, write = size / self.ranks / COPIED, size / (WRITTEN * math.ceil(self.ranks / self.cluster.per_node))
        beside = self.config.checkpoint.asynchronous
        if beside is None:
            beside = not self.config.parallel.cpu_offload
        waits = copy + max(0.0, write - every * self.step.total) if beside else write
        count = 1 + (self.config.training.steps - 1) // every if every else 1
        return Checkpoints(size, waits, count, write)

    @property
    def seconds(self) -> float:
        """Of the run: its steps and what checkpoints stall."""
        return self.config.training.steps * self.step.total + self.checkpoints.count * self.checkpoints.stall

    @property
    def device_hours(self) -> float:
        return self.ranks * self.seconds / 3600

    @property
    def kilowatt_hours(self) -> float:
        """Of the devices alone."""
        return self.device_hours * self.cluster.device.watts * DRAWN / 1000


def plan(config: Config, ranks: int, cluster: Cluster) -> Plan:
    """The plan of a configuration whose vocabulary is known (`Config.resolved`)."""
    return Plan(config, ranks, cluster)
