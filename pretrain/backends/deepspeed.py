"""DeepSpeed's ZeRO 0 to 3 behind the Backend interface."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from configs.durable import sync
from configs.errors import UserError
from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.build import build_model
from model.costs.parameters import parameters
from model.initialization import InitialWeights, init_weights
from model.row import RowModel
from pretrain.backends.base import StepResult
from pretrain.backends.deepspeed_process import ModelParallelUnit, forget_deepspeed, prepare_deepspeed
from pretrain.checkpoints.portable import KINDS, MOMENTS, WholeFile
from pretrain.checkpoints.store import ENGINE_FOLDER, is_portable, load_tensors
from pretrain.checkpoints.zero import StateFiles, WholeStates, restore_optimizer
from pretrain.distributed.collectives import counted_once, gradient_norm
from pretrain.distributed.layers import make_layers
from pretrain.distributed.layout import Layout
from pretrain.objectives import NextToken, mean_weight, weighted_sum
from pretrain.optim.groups import build_optimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

OPTIMIZER_SETTINGS = ("weight_decay", "betas", "eps")
# What DeepSpeed's own shards hold besides tensors and plain containers: plain data, no code runs when it is read.
SAFE_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class DeepSpeedBackend:
    """One DeepSpeed engine. In bf16 the model is cast and fp32 master weights are kept."""

    def __init__(self, config: Config, layout: Layout, checkpoint: Path | None = None) -> None:
        prepare_deepspeed()
        layout.at_close(forget_deepspeed)
        self.config, self.layout, self.checkpoint = config, layout, checkpoint
        self.stage, self.objective = config.parallel.zero_stage, NextToken()
        self.layers = make_layers(config, layout)
        with _quiet():
            module = self.build_module()
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(module.named_parameters(), config.optimizer, whole_dimensions),
                config=self.engine_config(),
                mpu=self.model_parallel_unit,
            )
        self.device = layout.device
        self.layers.auxiliary.scale = 1 / self.engine.gradient_accumulation_steps()
        self.grad_norm = 0.0
        if self.stage == 0:
            # A plain optimizer reports no norm, and DeepSpeed's clipping before it counts tied stages twice.
            self.engine.optimizer.register_step_pre_hook(self._clip)
        self.files = SafeFiles()
        self.engine.checkpoint_engine = self.files
        # Its copy of zero_to_fp32.py unpickles what it reads, and fails outside our error handling on a full disk.
        self.engine._copy_recovery_script = lambda save_path: None

    @property
    def model_parallel_unit(self) -> Any:
        """The groups of tensor and data parallelism, where there is tensor parallelism; None: all ranks are data-parallel."""
        return ModelParallelUnit(self.layout) if self.layout.size("tensor") > 1 else None

    def build_module(self) -> torch.nn.Module:
        """What the engine trains, on its device and with its initial weights."""
        config, training = self.config, self.config.training
        if self.stage < 3:
            with torch.device("meta"):  # a full fp32 copy might not fit in CPU memory
                module = build_model(config.model, self.layers, training.recompute_activations)
            sharded = {name for name, p in module.named_parameters() if getattr(p, "tensor_model_parallel", False)}
            if training.precision == "bf16":
                module.bfloat16()
            module.to_empty(device=self.layout.device)
            for name, parameter in module.named_parameters():  # new ones, without the mark
                parameter.tensor_model_parallel = name in sharded  # type: ignore[attr-defined]
            init_weights(module, config.run.seed)
            return module
        mpu = self.model_parallel_unit
        cut = deepspeed.zero.Init(
            data_parallel_group=None if mpu is None else mpu.get_data_parallel_group(),
            config_dict_or_path=self.engine_config(),
            mpu=mpu,
            mem_efficient_linear=False,
        )
        with cut:
            module = build_model(config.model, self.layers, training.recompute_activations)
        init_shards(module, config.run.seed, self.layout.coordinate("data"))
        return module

    @property
    def module(self) -> torch.nn.Module:
        return self.engine.module

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        self.engine.train()
        self.set_learning_rate(learning_rate)
        weight, losses = mean_weight(micro_batches, self.device), []
        for batch in micro_batches:
            losses_BS = self.objective.losses(self.engine, batch, self.device)
            loss = weighted_sum(losses_BS, batch.weights).over(weight)
            self.engine.backward(loss)
            losses.append(loss.detach())
            self.engine.step()
        return self.result(float(torch.stack(losses).double().mean()), len(micro_batches))

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def result(self, cross_entropy: float, micro_batches: int) -> StepResult:
        """The step's report, auxiliary terms and all."""
        terms = {name: term / micro_batches for name, term in self.take_auxiliary().items()}
        grad_norm = self.grad_norm if self.stage == 0 else float(self.engine.get_global_grad_norm())
        return StepResult(cross_entropy + sum(terms.values()), grad_norm, terms)

    def take_auxiliary(self) -> dict[str, float]:
        """The step's auxiliary terms of the whole model, summed over micro-batches."""
        return {name: float(term) for name, term in self.layers.auxiliary.take().items()}

    def _clip(self, *_: Any) -> None:
        """Before the optimizer's step at stage 0; gradients are averaged over ranks by then."""
        limit = self.config.training.gradient_clipping
        self.grad_norm = gradient_norm(self.counted_parameters(), self.model_groups())
        if limit > 0 and self.grad_norm > limit:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, limit / (self.grad_norm + 1e-6))

    def counted_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those that count on this rank, so that every parameter counts once over `model_groups`."""
        yield from counted_once(self.module.parameters(), self.layout.coordinate("tensor"))

    def model_groups(self) -> list[torch.distributed.ProcessGroup]:
        """Groups that together hold one model."""
        return [self.layout.group("tensor")] if self.layout.size("tensor") > 1 else []

    @torch.no_grad()
    def eval_losses(self, batch: Batch) -> torch.Tensor:
        self.engine.eval()
        return self.objective.losses(self.engine, batch, self.device)

    def save(self, folder: Path) -> list[Path]:
        self.files.start()
        self.engine.save_checkpoint(str(folder), tag=ENGINE_FOLDER, save_latest=False)
        if self.files.failure is not None:
            raise OSError(f"{self.files.failure}") from self.files.failure
        return self.files.written

    def load(self, folder: Path) -> None:
        if is_portable(folder):
            self._load_portable(WholeFile(folder, self.config.model, self.layers.rank))
            return
        if self.stage > 0:
            model_rank = 0 if self.engine.mpu is None else self.engine.mpu.get_model_parallel_rank()
            states = StateFiles(folder / ENGINE_FOLDER, model_rank, SAFE_CLASSES)
            restore_optimizer(self.engine.optimizer, states, self.layout)
            return
        settings = [{name: group[name] for name in OPTIMIZER_SETTINGS} for group in self.engine.optimizer.param_groups]
        with _quiet():
            path, _ = self.engine.load_checkpoint(str(folder), tag=ENGINE_FOLDER)
        if path is None:
            raise UserError(f"{folder}: holds no shards that DeepSpeed ZeRO {self.stage} can read")
        for group, setting in zip(self.engine.optimizer.param_groups, settings, strict=True):
            group.update(setting)  # this run's configuration, not the one the checkpoint was written with

    @torch.no_grad()
    def _load_portable(self, file: WholeFile) -> None:
        if self.stage > 0:
            groups: list[dict[str, torch.Size]] = self.engine._get_zero_param_shapes()  # in the order of the flat groups
            named = [{self.parameter_name(name): shape for name, shape in group.items()} for group in groups]
            restore_optimizer(self.engine.optimizer, WholeStates(file, named), self.layout)
            return
        for name, parameter in self.module.named_parameters():
            shards = {kind: file.shard(kind, self.parameter_name(name), parameter.shape) for kind in KINDS}
            parameter.copy_(shards["model"])
            state: dict[str, torch.Tensor] = {kind: torch.empty_like(parameter).copy_(shards[kind]) for kind in MOMENTS}
            self.engine.optimizer.state[parameter] = {"step": file.step.to(parameter.device, copy=True), **state}

    def parameter_name(self, name: str) -> str:
        """The unsharded name of a parameter of the module."""
        return name

    def engine_config(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        training, parallel = self.config.training, self.config.parallel
        # DeepSpeed allocates the whole bucket, however small the part of the model that a rank has, and wants it even.
        own = sum(parameters(self.config.model).values()) // (self.layout.size("tensor") * self.layout.size("pipeline"))
        bucket = min(500_000_000, own + own % 2)
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self.stage == 3:
            zero["sub_group_size"] = 10**12  # one flat tensor for each optimizer group
        if parallel.cpu_offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.layout.device.type == "cuda"}
        engine: dict[str, Any] = {
            "train_batch_size": training.global_batch_size,
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * self.layout.size("data")),
            "gradient_clipping": training.gradient_clipping if self.stage > 0 else 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        if training.precision == "bf16":
            engine["bf16"] = {"enabled": True}
            engine["data_types"] = {"grad_accum_dtype": "fp32"}
            engine["communication_data_type"] = "fp32"  # the sum over ranks, too
        return engine


def whole_dimensions(parameter: torch.nn.Parameter) -> int:
    """A parameter's number of dimensions, also where ZeRO 3 has cut it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def init_shards(module: RowModel, seed: int, data_rank: int) -> None:
    """`init_weights` for a model whose parameters ZeRO 3 has cut: each rank fills its own part."""
    initial = InitialWeights(module.config, seed, module.layers.rank)
    named: Iterator[tuple[str, Any]] = module.named_parameters()
    for name, parameter in named:
        whole = initial(name, parameter.ds_shape).flatten()
        part = parameter.ds_tensor
        own = whole[data_rank * part.ds_numel :][: part.ds_numel]
        part.data.zero_()
        part.data[: own.numel()].copy_(own)


class SafeFiles(CheckpointEngine):
    """How DeepSpeed writes and reads its shards here: synced to disk, read without unpickling, failures kept for later.

    An error raised inside `save_checkpoint` would leave the other ranks in its barriers, so `save` remembers it instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "SafeFiles"
        self.start()

    def start(self) -> None:
        self.written: list[Path] = []
        self.failure: Exception | None = None

    def create(self, info: Any) -> None:
        """Folders are made by the caller."""

    def commit(self, info: Any) -> bool:
        return True

    def save(self, state_dict: Any, path: str) -> None:
        try:
            torch.save(state_dict, path)
            sync(Path(path))
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_tensors(Path(path), SAFE_CLASSES)


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """Keeps DeepSpeed's print statements (memory tables of its bf16 optimizer) off the screen; its log still speaks."""
    return contextlib.redirect_stdout(io.StringIO())
