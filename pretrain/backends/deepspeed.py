"""DeepSpeed's ZeRO 0 to 3 behind the Backend interface."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.build import build_model, unsharded_shapes
from model.costs.parameters import parameters
from model.initialization import InitialWeights, init_weights
from model.parallel.sharding import counted_once, partition_specs
from model.row import RowModel
from pretrain.backends.base import Accepts, StepResult, Timed, finite, timed_modules, timed_objective
from pretrain.backends.deepspeed_process import ModelParallelUnit, prepare_deepspeed
from pretrain.backends.guard import Guard
from pretrain.backends.zero import master_vectors, plain_vectors, update_weights
from pretrain.checkpoints.state import WEIGHTS, Block, Part, State, takes_turn
from pretrain.distributed.layers import make_layers
from pretrain.distributed.layout import Layout
from pretrain.objectives.base import WeightedSum, mean_weight
from pretrain.objectives.registry import make_objective
from pretrain.optim.clipping import clip_gradients
from pretrain.optim.groups import build_optimizer, set_learning_rate
from pretrain.optim.state import optimizer_state
from pretrain.report.step_parts import OPTIMIZER

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed


class DeepSpeedBackend:
    """One DeepSpeed engine. In bf16 the model is cast and fp32 master weights are kept."""

    overlaps = True  # GPUs send gradients while the backward pass goes on, which takes a second bucket

    def __init__(self, config: Config, layout: Layout, checkpoint: Path | None = None) -> None:
        prepare_deepspeed(layout)
        self.config, self.layout, self.checkpoint = config, layout, checkpoint
        self.stage, self.objective = config.parallel.zero_stage, make_objective(config)
        self.layers = make_layers(config, layout)
        with _quiet():
            module = self.build_module()
            self.specs = partition_specs(module)
            for name, parameter in module.named_parameters():  # DeepSpeed's gradient norm counts by this
                parameter.tensor_model_parallel = self.specs[name].dim is not None  # type: ignore[attr-defined]
            optimizer = build_optimizer(module.named_parameters(), config.optimizer, unsharded_dimensions, self.parameter_name)
            # Inside ZeRO's own, which steps it once gradients are reduced, measured and clipped.
            self.guard = Guard(optimizer, self._grad_norm, self.own_loss)
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=self.engine_config(),
                mpu=self.model_parallel_unit,
            )
        self.device = layout.device
        self.layers.auxiliary.scale = 1 / self.engine.gradient_accumulation_steps()
        self.losses: list[torch.Tensor] = []  # of the running step's micro-batches

    @property
    def model_parallel_unit(self) -> Any:
        """Process groups of tensor and data parallelism; None without tensor parallelism: all ranks are data-parallel."""
        return ModelParallelUnit(self.layout) if self.layout.size("tensor") > 1 else None

    def build_module(self) -> torch.nn.Module:
        """What the engine trains, on its device and with its initial weights."""
        config, training = self.config, self.config.training
        if self.stage < 3:
            with torch.device("meta"):  # a full fp32 copy might not fit in CPU memory
                module = build_model(config.model, self.layers, training.recompute_activations)
            if training.precision == "bf16":
                module.bfloat16()
            module.to_empty(device=self.layout.device)
            init_weights(module, config.run.seed)
            return module
        mpu = self.model_parallel_unit
        sharded = deepspeed.zero.Init(
            data_parallel_group=None if mpu is None else mpu.get_data_parallel_group(),
            config_dict_or_path=self.engine_config(),
            mpu=mpu,
            mem_efficient_linear=False,
        )
        with sharded:
            module = build_model(config.model, self.layers, training.recompute_activations)
        init_shards(module, config.run.seed, self.layout.coordinate("data"))
        return module

    @property
    def module(self) -> torch.nn.Module:
        return self.engine.module

    def train_step(self, micro_batches: list[Batch], learning_rate: float, accepts: Accepts = finite) -> StepResult:
        self.engine.train()
        self.begin(learning_rate, accepts)
        step = [self.objective.examples(batch) for batch in micro_batches]
        weight = mean_weight(step, self.device)
        self.losses.clear()
        for examples in step:
            loss = self.objective.loss_of(self.engine, examples, self.layers, self.device).over(weight)
            self.engine.backward(loss)
            self.losses.append(loss.detach())
            self.engine.step()
        return self.result(self._mean_loss(), len(micro_batches))

    def begin(self, learning_rate: float, accepts: Accepts) -> None:
        """Before a step: its learning rate and what decides whether it is taken."""
        self.guard.begin(accepts)
        set_learning_rate(self.engine.optimizer.param_groups, learning_rate)

    def result(self, loss: float, micro_batches: int) -> StepResult:
        """The step's report; `loss` is the objective's, without auxiliary terms."""
        skipped = not self.guard.accepted()
        terms = {name: term / micro_batches for name, term in self.take_auxiliary().items()}
        return StepResult(loss + sum(terms.values()), self.guard.grad_norm, terms, skipped)

    def own_loss(self) -> float:
        """This rank's share of the running step's loss, auxiliary terms included, before the optimizer steps."""
        return self._mean_loss() + self.own_terms()

    def own_terms(self) -> float:
        """The running step's auxiliary terms on this rank, a mean over its micro-batches."""
        return float(sum(self.layers.auxiliary.sums().values())) * self.layers.auxiliary.scale

    def _mean_loss(self) -> float:
        return float(torch.stack(self.losses).double().mean())

    def take_auxiliary(self) -> dict[str, float]:
        """The step's auxiliary terms of the unsharded model, summed over micro-batches."""
        return {name: float(term) for name, term in self.layers.auxiliary.take().items()}

    def _grad_norm(self) -> float:
        """Before the optimizer's step, when gradients have been averaged over ranks. ZeRO's own has measured and clipped them.

        It reports infinity where they are not finite.
        """
        if self.stage > 0:
            return float(self.engine.optimizer._global_grad_norm)
        # A plain optimizer measures nothing, and DeepSpeed's clipping before it counts tied stages twice.
        limit, parameters = self.config.training.gradient_clipping, self.module.parameters()
        return clip_gradients(parameters, self.counted_parameters(), self.model_groups(), limit, self.device)

    def counted_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those that count on this rank, so that every parameter counts once over `model_groups`."""
        counted = counted_once(self.specs, self.layout.coordinate("tensor"))
        for name, parameter in self.module.named_parameters():
            if name in counted and self.owns(parameter):
                yield parameter

    def model_groups(self) -> list[torch.distributed.ProcessGroup]:
        """Process groups that together hold one model."""
        return [self.layout.group("tensor")] if self.layout.size("tensor") > 1 else []

    @torch.no_grad()
    def eval_loss(self, batch: Batch) -> WeightedSum:
        self.engine.eval()
        return self.objective.loss_of(self.engine, self.objective.examples(batch), self.layers, self.device)

    def timed(self) -> Iterator[Timed]:
        tensor = self.layout.size("tensor") > 1
        yield from timed_modules(self.module, waits=tensor or self.stage == 3)  # stage 3 gathers inside of blocks
        yield from timed_objective(self.objective, waits=tensor)
        yield Timed(self.engine, "_take_model_step", OPTIMIZER, waits=True)

    def state(self) -> State:
        blocks = self._blocks()
        zero = self.engine.optimizer if self.stage > 0 else None
        optimizer = self.engine.optimizer if zero is None else zero.optimizer
        held = plain_vectors(self.module, optimizer) if zero is None else master_vectors(zero, self.layout.coordinate("data"))
        parts, scalars = list[Part](), defaultdict[str, list[torch.Tensor]](list)
        for vector, kept, fragments in held:
            state = optimizer_state(optimizer, vector, kept)
            for name in kept.scalars:
                scalars[name].append(state[name])
            for fragment in fragments:
                for kind, values in {WEIGHTS: vector, **{kind: state[kind] for kind in kept.states}}.items():
                    parts += blocks[fragment.parameter].fragment(kind, fragment.of(values), fragment.start)
        return State(parts, scalars)

    def load_state(self, read: Callable[[State], None]) -> None:
        read(self.state())
        if self.stage > 0:
            update_weights(self.engine.optimizer)

    def _blocks(self) -> dict[torch.nn.Parameter, Block]:
        """Where each of this rank's parameters lies in the unsharded model."""
        shapes, rank, blocks = unsharded_shapes(self.config.model), self.layout.coordinate("tensor"), {}
        names = sorted((self.parameter_name(name), name) for name in self.specs)
        for number, (name, own_name) in enumerate(names):
            parameter, spec = self.module.get_parameter(own_name), self.specs[own_name]
            replicas = [(self.layout.coordinate("data"), self.layout.size("data"))] if self.stage == 0 else []
            if spec.dim is None:
                replicas.append((rank, self.layout.size("tensor")))
            owned = self.owns(parameter) and takes_turn(number, *replicas)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            blocks[parameter] = Block(name, tuple(shapes[name]), spec.origin(shapes[name], rank), shape, owned)
        return blocks

    def parameter_name(self, name: str) -> str:
        """The unsharded name of a parameter of the module."""
        return name

    def owns(self, parameter: torch.nn.Parameter) -> bool:
        """Whether a parameter belongs to this rank's part of the model, rather than being a copy of another part's."""
        return True

    def engine_config(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        training, parallel = self.config.training, self.config.parallel
        # DeepSpeed allocates the whole bucket, however small the part of the model that a rank has, and wants it even.
        own = sum(parameters(self.config.model).values()) // (self.layout.size("tensor") * self.layout.size("pipeline"))
        bucket = min(500_000_000, own + own % 2)
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self.overlaps and self.stage in (1, 2) and self.layout.device.type == "cuda":  # stage 3 does so by itself
            zero["overlap_comm"] = True
        if self.stage == 3:
            zero["sub_group_size"] = 10**12  # one flat tensor for each parameter group
        if parallel.cpu_offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.layout.device.type == "cuda"}
        engine: dict[str, Any] = {
            "train_batch_size": training.global_batch_size,
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * self.layout.size("data")),
            "gradient_clipping": training.gradient_clipping if self.stage > 0 else 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,  # else only the classes of its own list
            "steps_per_print": 2**31,
        }
        if training.precision == "bf16":
            # Its check for gradients that are not finite is one more pass over them and, with CPU offload, leaves them in a
            # buffer that the next step adds to. The guard sees the norm.
            engine["bf16"] = {"enabled": True, "check_grad_overflow": False}
            engine["data_types"] = {"grad_accum_dtype": "fp32"}
            engine["communication_data_type"] = "fp32"  # the sum over ranks, too
        return engine


def unsharded_dimensions(parameter: torch.nn.Parameter) -> int:
    """A parameter's number of dimensions, also where ZeRO 3 has sharded it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def init_shards(module: RowModel, seed: int, data_rank: int) -> None:
    """`init_weights` for a model whose parameters ZeRO 3 has sharded: each rank fills its own part."""
    initial = InitialWeights(module.config, seed, partition_specs(module), module.layers.rank)
    named: Iterator[tuple[str, Any]] = module.named_parameters()
    for name, parameter in named:
        part = parameter.ds_tensor
        own = initial(name).flatten()[data_rank * part.ds_numel :][: part.ds_numel]
        part.data.zero_()
        part.data[: own.numel()].copy_(own)


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Keeps DeepSpeed's print statements (memory tables of its bf16 optimizer) off the screen; its log still speaks."""
    return contextlib.redirect_stdout(io.StringIO())
