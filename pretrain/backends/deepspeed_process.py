"""DeepSpeed's process-wide state: set up before an engine is built, and undone when its layout closes."""

from __future__ import annotations

import logging
import os
import warnings

import torch
import torch.distributed as dist

from pretrain.distributed.layout import Layout

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it anyway, but with a warning on every rank

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.activation_checkpointing import checkpointing
    from deepspeed.runtime.pipe import p2p
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
    from deepspeed.utils import groups
    from deepspeed.utils import logger as deepspeed_logger


def prepare_deepspeed(layout: Layout | None = None) -> None:
    """Make DeepSpeed quiet and let it use torch's default process group; call it before anything else of DeepSpeed.

    All other groups it takes from `layout`, if given, which forgets DeepSpeed when it closes.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # avoids two minutes of compiling at the first start
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    if layout is not None:
        # DeepSpeed can be given no pipeline's groups and no timeout. All of its code makes groups by this method.
        deepspeed.comm.comm.cdb.new_group = layout.group_of
        layout.at_close(forget_deepspeed)


def forget_deepspeed() -> None:
    """Drop DeepSpeed's references to process groups and modules, so that the next engine makes its own."""
    groups._release_process_group_references()
    deepspeed.comm.comm.cdb = None
    p2p._groups = p2p._grid = None
    p2p._async.clear()
    parameter_offload.FWD_MODULE_STACK.clear()
    # ZeRO 3 leaves a linear of its own, which rounds otherwise, in torch's place.
    torch.nn.functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", torch.nn.functional.linear)
    checkpointing.mpu = checkpointing.mp_rank = checkpointing.mp_size = checkpointing.mp_group = None


class ModelParallelUnit:
    """A layout under the names by which DeepSpeed asks for it: its `mpu`, after Megatron's model parallel unit.

    It describes layouts without pipelines, in which the ranks of a model are its tensor-parallel ranks.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.layout.group("tensor")

    def get_tensor_model_parallel_rank(self) -> int:
        return self.layout.coordinate("tensor")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.layout.size("tensor")

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.layout.group("data")

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.layout.ranks("data")

    def get_data_parallel_rank(self) -> int:
        return self.layout.coordinate("data")

    def get_data_parallel_world_size(self) -> int:
        return self.layout.size("data")
