"""DeepSpeed: ZeRO 0, 1 and 2 behind the Backend interface. The only module that imports deepspeed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from configs.durable import sync
from configs.errors import UserError
from configs.schema import Config
from data_pipeline.loader import Batch
from pretrain.backends.base import StepResult
from pretrain.checkpoint import ENGINE_FOLDER, load_tensors
from pretrain.optim import build_optimizer
from pretrain.parallel import TensorAndDataGroups, World, gradient_norm

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # found anyway, but with a warning on every rank
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils.tensor_fragment import fragment_address

OPTIMIZER_SETTINGS = ("weight_decay", "betas", "eps")
# What DeepSpeed's own shards hold besides tensors and plain containers: plain data, no code runs when it is read.
SAFE_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def initialize_distributed(timeout_minutes: float = 30) -> None:
    """Join the process group that the launcher described; alone, a group of one."""
    deepspeed_logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # else two minutes of compiling at first start
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    if "RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists on it
        store = torch.distributed.HashStore()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=timeout_minutes))


class DeepSpeedBackend:
    """One DeepSpeed engine. `module` has its initial weights; in bf16 it is cast and fp32 master weights are kept."""

    def __init__(self, config: Config, module: torch.nn.Module, world: World, groups: TensorAndDataGroups | None) -> None:
        self.stage = config.parallel.zero_stage
        self.groups = groups
        with _quiet():
            self.engine, *_ = deepspeed.initialize(
                model=module.to(world.device),
                optimizer=build_optimizer(module.named_parameters(), config.optimizer),
                config=_engine_config(config, world, sum(p.numel() for p in module.parameters())),
                mpu=groups,
            )
        self.device = world.device
        self.files = SafeFiles()
        self.engine.checkpoint_engine = self.files
        # Its copy of zero_to_fp32.py unpickles what it reads, and fails outside our error handling on a full disk.
        self.engine._copy_recovery_script = lambda save_path: None

    @property
    def module(self) -> torch.nn.Module:
        return self.engine.module

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        losses = []
        grad_norm = 0.0
        for number, batch in enumerate(micro_batches, start=1):
            token_losses = self.engine(batch.tokens.to(self.device), batch.labels.to(self.device))
            loss = token_losses.mean()
            self.engine.backward(loss)
            losses.append(loss.detach())
            if number == len(micro_batches) and self.stage == 0:
                # A plain optimizer reports no norm; the gradients are already averaged over ranks and not yet clipped.
                grad_norm = gradient_norm(self.module.parameters(), self.groups)
            self.engine.step()
        if self.stage > 0:
            grad_norm = float(self.engine.get_global_grad_norm())
        return StepResult(loss=float(torch.stack(losses).double().mean()), grad_norm=grad_norm)

    @torch.no_grad()
    def eval_losses(self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        self.engine.eval()
        return self.module(tokens_BS.to(self.device), labels_BS.to(self.device))

    def save(self, folder: Path) -> list[Path]:
        self.files.start()
        self.engine.save_checkpoint(str(folder), tag=ENGINE_FOLDER, save_latest=False)
        if self.files.failure is not None:
            raise OSError(f"{self.files.failure}") from self.files.failure
        return self.files.written

    def load(self, folder: Path) -> None:
        settings = [{name: group[name] for name in OPTIMIZER_SETTINGS} for group in self.engine.optimizer.param_groups]
        with _quiet():
            path, _ = self.engine.load_checkpoint(str(folder), tag=ENGINE_FOLDER)
        if path is None:
            raise UserError(f"{folder}: holds no shards that DeepSpeed ZeRO {self.stage} can read")
        for group, setting in zip(self.engine.optimizer.param_groups, settings, strict=True):
            group.update(setting)  # this run's configuration, not the one the checkpoint was written with


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


def _engine_config(config: Config, world: World, parameters: int) -> dict[str, Any]:
    training = config.training
    bucket = min(500_000_000, parameters)  # DeepSpeed allocates the whole bucket, however small the model
    engine: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * world.data_size),
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": 2**31,
    }
    if training.precision == "bf16":
        engine["bf16"] = {"enabled": True}
        engine["data_types"] = {"grad_accum_dtype": "fp32"}
        engine["communication_data_type"] = "fp32"  # the sum over ranks, too
    return engine
