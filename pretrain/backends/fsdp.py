"""torch's fully sharded data parallelism (FSDP2, `fully_shard`) behind the Backend interface."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.build import build_model, unsharded_shapes
from model.initialization import InitialWeights
from model.parallel.sharding import counted_once, partition_specs
from model.row import RowModel
from pretrain.backends.base import Accepts, StepResult, Timed, finite, timed_modules, timed_objective
from pretrain.backends.float8 import check_float8, convert_to_float8
from pretrain.checkpoints.state import WEIGHTS, Block, Part, State, takes_turn
from pretrain.distributed.layers import make_layers
from pretrain.distributed.layout import Layout
from pretrain.objectives.base import WeightedSum, mean_weight
from pretrain.objectives.registry import make_objective
from pretrain.optim.clipping import clip_gradients
from pretrain.optim.groups import build_optimizer, set_learning_rate
from pretrain.optim.state import kept_of, optimizer_state
from pretrain.report.step_parts import OPTIMIZER

# What a block or the model gives out may be a view; nothing that autograd follows writes into it.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
# FSDP hides what it gathers by other streams, all at once.
warnings.filterwarnings("ignore", message=".*set the environment variable CUDA_DEVICE_MAX_CONNECTIONS", category=UserWarning)
# megatron-core and FSDP2 itself still call collectives by their older names.
warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")


class FSDPBackend:
    """Every block and what is around them sharded over the data-parallel ranks; parameters and optimizer in fp32."""

    def __init__(self, config: Config, layout: Layout, checkpoint: Path | None = None) -> None:
        if config.training.precision == "fp8":
            check_float8(layout.device)
        self.layout = layout
        self.clipping, self.objective = config.training.gradient_clipping, make_objective(config)
        self.layers = make_layers(config, layout)
        with torch.device("meta"):
            self.model = build_model(config.model, self.layers, config.training.recompute_activations)
        self.specs = partition_specs(self.model)  # now: fully_shard puts other parameters in the place of these
        self.counted = counted_once(self.specs, layout.coordinate("tensor"))
        self.shapes = unsharded_shapes(config.model)
        mesh = layout.mesh("replicate", "shard")
        self.shard_group = mesh.get_group(mesh.ndim - 1)
        _shard(self.model, config, mesh)
        storage = torch.device("cpu") if config.parallel.cpu_offload else layout.device
        initial = InitialWeights(config.model, config.run.seed, self.specs, self.layers.rank)
        self.parameters = _materialize(self.model, storage, initial)
        self.optimizer = build_optimizer(self.parameters.items(), config.optimizer)
        self.kept = kept_of(self.optimizer)

    @property
    def module(self) -> nn.Module:
        return self.model

    def train_step(self, micro_batches: list[Batch], learning_rate: float, accepts: Accepts = finite) -> StepResult:
        self.model.train()
        auxiliary = self.layers.auxiliary
        auxiliary.scale = 1 / len(micro_batches)
        step = [self.objective.examples(batch) for batch in micro_batches]
        weight, losses = mean_weight(step, self.layout.device), []
        for number, examples in enumerate(step, start=1):
            self.model.set_requires_all_reduce(number == len(step))  # type: ignore[operator]  # over replicas, once
            loss = self.objective.loss_of(self.model, examples, self.layers, self.layout.device).over(weight)
            (loss * auxiliary.scale).backward()  # reduces the gradients, too, so that none is kept unsharded
            losses.append(loss.detach())
        terms = {name: float(total) * auxiliary.scale for name, total in auxiliary.take().items()}
        grad_norm = self._clip_gradients()

        def own_loss() -> float:
            return float(torch.stack(losses).double().mean()) + sum(terms.values())

        if accepted := accepts(grad_norm, own_loss):
            set_learning_rate(self.optimizer.param_groups, learning_rate)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(own_loss(), grad_norm, terms, skipped=not accepted)

    def _clip_gradients(self) -> float:
        """Their norm over all ranks, before."""
        counted = [parameter for name, parameter in self.parameters.items() if name in self.counted]
        groups = [self.shard_group, *([self.layout.group("tensor")] if self.layout.size("tensor") > 1 else [])]
        return clip_gradients(self.parameters.values(), counted, groups, self.clipping, self.layout.device)

    @torch.no_grad()
    def eval_loss(self, batch: Batch) -> WeightedSum:
        self.model.eval()
        total = self.objective.loss_of(self.model, self.objective.examples(batch), self.layers, self.layout.device)
        self.model.reshard()  # type: ignore[operator]  # else the root's stay unsharded until a backward pass, also through `load`
        return total

    def timed(self) -> Iterator[Timed]:
        waits = self.layout.size("tensor") > 1  # FSDP gathers a block before it runs
        yield from timed_modules(self.model, waits)
        yield from timed_objective(self.objective, waits)
        yield Timed(self, "_clip_gradients", OPTIMIZER, waits=True)
        yield Timed(self.optimizer, "step", OPTIMIZER, waits=False)
        yield Timed(self.optimizer, "zero_grad", OPTIMIZER, waits=False)

    def state(self) -> State:
        parts, scalars = list[Part](), defaultdict[str, list[Tensor]](list)
        for number, (name, parameter) in enumerate(sorted(self.parameters.items())):
            kept = self.kept[parameter]
            state = optimizer_state(self.optimizer, parameter, kept)
            for scalar in kept.scalars:
                scalars[scalar].append(state[scalar])
            block = self._block(number, name, parameter)
            tensors: dict[str, Any] = {WEIGHTS: parameter, **{kind: state[kind] for kind in kept.states}}
            for kind, tensor in tensors.items():
                parts += block.part(kind, tensor.detach().to_local())
        return State(parts, scalars)

    def load_state(self, read: Callable[[State], None]) -> None:
        read(self.state())

    def _block(self, number: int, name: str, parameter: Tensor) -> Block:
        """This rank's shard of the tensor-parallel block that is a parameter here."""
        assert isinstance(parameter, DTensor)
        offset, replicas = local_place(parameter)
        spec, unsharded = self.specs[name], self.shapes[name]
        if spec.dim is None:
            replicas.append((self.layout.coordinate("tensor"), self.layout.size("tensor")))
        origin = tuple(map(sum, zip(spec.origin(unsharded, self.layout.coordinate("tensor")), offset, strict=True)))
        return Block(name, tuple(unsharded), origin, tuple(parameter.to_local().shape), takes_turn(number, *replicas))


def local_place(tensor: DTensor) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Where this rank's shard begins in a DTensor; its coordinate and the number of copies along axes that hold copies."""
    offset, length, replicas = [0] * tensor.dim(), list(tensor.shape), []
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None
    for axis, (placement, coordinate) in enumerate(zip(tensor.placements, coordinates, strict=True)):
        ranks = tensor.device_mesh.size(axis)
        if not isinstance(placement, Shard):
            replicas.append((coordinate, ranks))
            continue
        dim = placement.dim
        chunk = -(-length[dim] // ranks)  # as torch.chunk splits: the last ranks may have less or nothing
        start = min(coordinate * chunk, length[dim])
        offset[dim] += start
        length[dim] = min(chunk, length[dim] - start)
    return tuple(offset), replicas


def _shard(model: RowModel, config: Config, mesh: DeviceMesh) -> None:
    """Shard a model on the meta device: each block by itself, then all that is left."""
    assert not list(model.buffers()), "nothing would fill them"
    training = config.training
    options: dict[str, Any] = {"mesh": mesh}
    if training.precision != "fp32":
        # Hidden states have the weights' type already. Casting inputs would round angles and slopes of positions to bf16 and
        # copy what all blocks share of a mask for each of them.
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if config.parallel.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    for block in model.block_modules():
        if training.precision == "fp8":
            convert_to_float8(block)
        if training.compile:
            block.compile()
        fully_shard(block, **options)
    fully_shard(model, **options)


def _materialize(model: RowModel, device: torch.device, initial: InitialWeights) -> dict[str, nn.Parameter]:
    """The parameters by name, each rank's own part allocated and filled without communication."""
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        _fill(parameter, initial(name))
    return parameters


@torch.no_grad()
def _fill(sharded: Tensor, unsharded: Tensor) -> None:
    """Each rank its own part, from what all of them have unsharded."""
    assert isinstance(sharded, DTensor)
    own = distribute_tensor(unsharded, sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.to_local().copy_(own.to_local())
