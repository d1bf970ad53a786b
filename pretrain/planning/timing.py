"""How long a step takes: computation, collectives that it does not hide, the pipeline's bubble, the optimizer. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from configs.schema import Config, ModelConfig
from model.attention.registry import layer_configs
from model.costs.communication import mhe_gather
from model.costs.parameters import attention_parameters, mlp_matrices, norm_vectors, parameters, vocabulary
from model.parallel.balance import stage_bounds
from pretrain.engines import engine
from pretrain.hardware import Kernel
from pretrain.planning.cluster import Cluster
from pretrain.planning.rates import LAUNCH, MEMORY, backward_seconds, forward_seconds
from pretrain.planning.traffic import Transfer
from pretrain.planning.work import OPTIMIZER_BYTES, Share, Work, embedding_work, layer_work, output_work

Sent = Callable[[int], Sequence[Transfer]]  # of the number of a pipeline's stage
CONTENTION = 0.15  # of the time of hidden collectives that computation loses to them: multiprocessors, memory; fitted
MICRO_BATCH_BYTES = {"zero0": 8, "zero1": 10, "zero2": 12, "zero3": 16, "fsdp": 16}  # of each value, to cast, copy and add up


@dataclass(frozen=True)
class Execution:
    """How a run executes beside what its configuration says; the defaults are this project's, the others published runs'.

    `kernel`: of attention. `interleave`: parts of the model on each pipeline stage. `context`: ranks that share each sample.
    `recomputed`: the share of a block's products that the backward pass repeats. `hides`: of an axis' collectives the share
    that is hidden, whatever `Transfer.hidden_by` says.
    """

    kernel: Kernel = "flash"
    compiled: bool = False
    plain_norms: bool = False
    interleave: int = 1
    context: int = 1
    recomputed: float = 0.0
    recomputes_attention: bool = True
    hides: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Timed:
    """A transfer, its seconds in a step and those that nothing hides."""

    transfer: Transfer
    seconds: float
    exposed: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest stage; they sum to `total`.

    `products`, `attention` and `passes` (through memory) are computation, `repeated` what recomputation adds, `waiting` what
    launching kernels takes beyond it, `slowed` what hidden collectives take from it; `exposed` collectives, `bubble` the
    pipeline's, and `optimizer`.
    """

    products: float
    attention: float
    passes: float
    repeated: float
    waiting: float
    slowed: float
    exposed: float
    bubble: float
    optimizer: float
    transfers: tuple[Timed, ...]

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in PARTS)


PARTS = ("products", "attention", "passes", "repeated", "waiting", "slowed", "exposed", "bubble", "optimizer")


def execution_of(config: Config) -> Execution:
    """As this project's engines execute a configuration."""
    return Execution(compiled=config.training.compile, recomputed=float(config.training.recompute_activations))


def step_time(config: Config, ranks: int, cluster: Cluster, sent: Sent, execution: Execution | None = None) -> StepTime:
    """The step of a resolved configuration on so many ranks; `sent` says what those of a stage send."""
    execution = execution or execution_of(config)
    parallel, training = config.parallel, config.training
    data = ranks // (parallel.tensor * parallel.pipeline * execution.context)
    micro_batches = training.global_batch_size // (training.micro_batch_size * data)
    share = _share(config, execution, cluster)
    stages = [_stage(config, cluster, execution, share, stage) for stage in stage_layers(config.model, parallel.pipeline)]
    slowest = max(stages, key=lambda stage: stage.total)
    transfers = sent(stages.index(slowest))
    one = slowest.plus(_sums(config, cluster, data))
    step = one.times(micro_batches)
    timed = list(_timed(config, ranks, cluster, transfers, execution, step))
    hidden = sum(each.seconds - each.exposed for each in timed)
    exposed = sum(each.exposed for each in timed)
    between = sum(each.exposed for each in timed if each.transfer.axis in ("tensor", "pipeline"))
    slowed = CONTENTION * hidden
    bubble = (parallel.pipeline - 1) / execution.interleave * (one.total + (slowed + between) / micro_batches)
    return StepTime(
        products=step.products,
        attention=step.attention,
        passes=step.passes,
        repeated=step.repeated,
        waiting=step.waiting,
        slowed=slowed,
        exposed=exposed,
        bubble=bubble,
        optimizer=_optimizer(config, cluster, data),
        transfers=tuple(timed),
    )


@lru_cache(1024)
def stage_layers(model: ModelConfig, stages: int) -> tuple[tuple[ModelConfig | str, ...], ...]:
    """The layers of each stage, with "embedding" and "output", balanced by parameters as the engine does."""
    blocks = layer_configs(model)
    ends = model.hidden_size * vocabulary(model)
    weights = [ends, *(_block_values(layer) for layer in blocks), ends + model.hidden_size]
    row: list[ModelConfig | str] = ["embedding", *blocks, "output"]
    bounds = stage_bounds(weights, range(2, len(blocks) + 1), stages)
    return tuple(tuple(row[bounds[stage] : bounds[stage + 1]]) for stage in range(stages))


def _block_values(layer: ModelConfig) -> int:
    mlp = layer.hidden_size * layer.ffn_width * mlp_matrices(layer)
    return attention_parameters(layer) + mlp + 2 * layer.hidden_size * norm_vectors(layer)


@dataclass(frozen=True)
class _Compute:
    """Seconds of computation; `backward` and `forward` are those of the two passes, among which the others are."""

    products: float = 0
    attention: float = 0
    passes: float = 0
    repeated: float = 0
    waiting: float = 0
    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.passes + self.repeated + self.waiting

    def plus(self, other: _Compute) -> _Compute:
        return _Compute(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def times(self, count: float) -> _Compute:
        return _Compute(*(getattr(self, name) * count for name in self.__dataclass_fields__))


def _share(config: Config, execution: Execution, cluster: Cluster) -> Share:
    parallel, training = config.parallel, config.training
    gather = parallel.mhe_gather
    if gather == "auto":
        gather = mhe_gather(config.model, training.micro_batch_size * config.row_length, parallel.sequence)
    return Share(
        samples=training.micro_batch_size,
        length=config.row_length,
        tensor=parallel.tensor,
        sequence=parallel.sequence and parallel.tensor > 1,
        context=execution.context,
        gather=gather,
        shares_scores=config.model.attention_kernel == "auto" and cluster.device.is_cpu,
        value=4 if training.precision == "fp32" else 2,
        compiled=execution.compiled,
        plain_norms=execution.plain_norms,
    )


def _stage(
    config: Config, cluster: Cluster, execution: Execution, share: Share, layers: tuple[ModelConfig | str, ...]
) -> _Compute:
    """One micro-batch on one stage."""
    total, precision = _Compute(), config.training.precision
    counts: dict[ModelConfig | str, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    for layer, count in counts.items():
        if isinstance(layer, str):
            work = embedding_work(config.model, share) if layer == "embedding" else output_work(config.model, share)
            wide = "bf16" if precision == "fp8" else precision  # only blocks compute in float8
            one = _of_work(work, cluster, wide, replace(execution, recomputed=0.0), share.value)
        else:
            one = _of_work(layer_work(layer, share), cluster, precision, execution, share.value)
        total = total.plus(one.times(count))
    return total


def _of_work(work: Work, cluster: Cluster, precision: str, execution: Execution, value: int) -> _Compute:
    device = cluster.device
    forward = forward_seconds(work, device, precision, execution.kernel, value)
    backward = backward_seconds(work, device, precision, execution.kernel, value)
    products, attention, passes = (sum(both) for both in zip(forward, backward, strict=True))
    repeated = 0.0
    if execution.recomputed:
        again = forward[1] if execution.recomputes_attention else 0.0
        repeated = execution.recomputed * forward[0] + again + forward[2]
    launched = LAUNCH * work.launches * (not device.is_cpu)
    waiting = max(0.0, launched - sum(forward)) + max(0.0, 2 * launched - sum(backward))
    return _Compute(products, attention, passes, repeated, waiting, sum(forward), sum(backward) + repeated)


def _sums(config: Config, cluster: Cluster, data: int) -> _Compute:
    """What each micro-batch takes for weights and gradients: casting, copying, adding up."""
    sharding = engine(config.backend).sharding(config.parallel)
    seconds = MICRO_BATCH_BYTES[sharding] * _own_values(config) / (MEMORY * cluster.device.bandwidth)
    return _Compute(passes=seconds, backward=seconds)


def _own_values(config: Config) -> float:
    """Parameters of one rank before data parallelism shards them."""
    return sum(parameters(config.model).values()) / (config.parallel.tensor * config.parallel.pipeline)


def _optimizer(config: Config, cluster: Cluster, data: int) -> float:
    sharding = engine(config.backend).sharding(config.parallel)
    shards = 1 if sharding == "zero0" else data // config.parallel.replicate
    return OPTIMIZER_BYTES * _own_values(config) / shards / (MEMORY * cluster.device.bandwidth)


def _timed(
    config: Config, ranks: int, cluster: Cluster, sent: Sequence[Transfer], execution: Execution, step: _Compute
) -> Iterator[Timed]:
    """Each transfer with its time. Those that one pass hides share its time; nothing hides the first call of each."""
    left = {"forward": step.forward, "backward": step.backward}
    for transfer in sent:
        seconds = cluster.seconds(
            transfer.op, transfer.sent, transfer.calls, transfer.group, _stride(config, ranks, transfer.axis)
        )
        if transfer.axis in execution.hides:
            yield Timed(transfer, seconds, seconds * (1 - execution.hides[transfer.axis]))
        elif not transfer.hidden_by:
            yield Timed(transfer, seconds, seconds)
        else:
            first = seconds / max(1, transfer.calls)
            hidden = min(seconds - first, left[transfer.hidden_by])
            left[transfer.hidden_by] -= hidden
            yield Timed(transfer, seconds, seconds - hidden)


def _stride(config: Config, ranks: int, axis: str) -> int:
    """The distance of neighbours on an axis, in ranks."""
    parallel = config.parallel
    data = ranks // (parallel.tensor * parallel.pipeline)
    strides = {"tensor": 1, "shard": parallel.tensor, "data": parallel.tensor, "loop": 1}
    strides["replicate"] = parallel.tensor * data // parallel.replicate
    strides["pipeline"] = parallel.tensor * data
    return strides[axis]
