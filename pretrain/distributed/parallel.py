"""Who am I among the processes: ranks, groups, device, seeds and the few reductions that the loop needs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.schema import Config
from model.costs.communication import Gather, mhe_gather
from model.layers import Layers


@dataclass(frozen=True)
class World:
    """This process's place.

    Ranks count tensor-parallel ranks first, then data-parallel ones, then pipeline stages, as Megatron and DeepSpeed do:
    rank = (pipeline_rank * data_size + data_rank) * tensor_size + tensor_rank.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    tensor_size: int = 1
    pipeline_size: int = 1

    @property
    def is_main(self) -> bool:
        """One rank speaks and writes what all share."""
        return self.rank == 0

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size % self.data_size

    @property
    def data_size(self) -> int:
        return self.size // (self.tensor_size * self.pipeline_size)

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor_size * self.data_size)

    @classmethod
    def from_environment(cls, tensor_size: int = 1, pipeline_size: int = 1) -> World:
        """Read what `deepspeed`, `torchrun` or nobody (one process) put into the environment."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=local_rank,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"),
            device=device,
            tensor_size=tensor_size,
            pipeline_size=pipeline_size,
        )


class TensorAndDataGroups:
    """The groups of tensor and data parallelism, as megatron-core makes them.

    Under the names by which DeepSpeed asks for them (its `mpu`, after Megatron's model parallel unit).
    """

    def __init__(self, world: World) -> None:
        """Every process calls it, once, after torch.distributed is initialised."""
        from megatron.core import parallel_state  # takes seconds to import, and one rank alone has no use for it

        self.world = world
        parallel_state.initialize_model_parallel(world.tensor_size, world.pipeline_size, create_gloo_process_groups=False)
        self.tensor: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self.data: dist.ProcessGroup = parallel_state.get_data_parallel_group()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self.world.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.world.tensor_size

    # Without pipelines, a model's ranks are its tensor-parallel ranks.
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data)

    def get_data_parallel_rank(self) -> int:
        return self.world.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.world.data_size


def make_layers(config: Config, groups: TensorAndDataGroups | None) -> Layers:
    """How a model's layers are made here: whole, or as this rank's shards of a resolved config."""
    if groups is None:
        return Layers()
    from model.parallel.tensor import TensorParallelLayers, parallel_config

    megatron = parallel_config(config.parallel.tensor, config.parallel.sequence)
    return TensorParallelLayers(megatron, groups.tensor, gathered(config))


def gathered(config: Config) -> Gather:
    """`parallel.mhe_gather` after its default."""
    if config.parallel.mhe_gather != "auto":
        return config.parallel.mhe_gather
    tokens = config.training.micro_batch_size * config.data.sequence_length
    return mhe_gather(config.model, tokens, config.parallel.sequence)


def prepare_process(world: World, deterministic: bool) -> None:
    """Device, threads and determinism of this process; before any tensor is made."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))
    if deterministic and world.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # with warn_only attention's backward would stay as it is
        deterministic_options: Any = torch.utils.deterministic
        deterministic_options.fill_uninitialized_memory = False  # costs time and changes no result of ours


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose and rank: runs with neighbouring seeds share none."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value averaged over all ranks, in float64; the same on every rank."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor.tolist()


def gradient_norm(parameters: Iterable[torch.nn.Parameter], groups: Sequence[dist.ProcessGroup]) -> float:
    """Norm of the gradients of `parameters` of all ranks of `groups`, one group after the other; 0 where there are none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if groups:
        squared = norm.double().square()
        for group in groups:
            dist.all_reduce(squared, group=group)
        norm = squared.sqrt()
    return float(norm)


def counted_once(parameters: Iterable[torch.nn.Parameter], tensor_rank: int) -> Iterator[torch.nn.Parameter]:
    """Those that count on this rank, so that each counts once over a tensor-parallel group: its shards, and replicas on one."""
    for parameter in parameters:
        if tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False):
            yield parameter


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def together(action: Callable[[], object], main_only: bool = False) -> None:
    """Run `action` on every rank, or on the first; what fails on one rank raises UserError on all: none waits for it."""
    failure = None
    if not main_only or not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except (OSError, RuntimeError, UserError) as error:
            failure = str(error) or type(error).__name__
    for text in gather_objects(failure):
        if text:
            raise UserError(text)


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
