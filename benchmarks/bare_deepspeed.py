"""Plain DeepSpeed, without this project's backend and loop: `deepspeed benchmarks/bare_deepspeed.py --config FILE`.

The baseline of launch/pretrain.py in benchmarks/overhead.py: forward, backward and step, nothing else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.build import build_model
from model.initialization import init_weights


def build(config: Config) -> Callable[[Sequence[Batch]], Tensor]:
    """A function that takes one optimizer step over a rank's micro-batches and returns their losses."""
    from pretrain.backends.deepspeed_process import deepspeed, prepare_deepspeed

    prepare_deepspeed()
    training, optimizer = config.training, config.optimizer
    model = build_model(config.model)
    init_weights(model, config.run.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    settings: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": size,
            "allgather_bucket_size": size,
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    betas = optimizer.beta1, optimizer.beta2
    adam = torch.optim.AdamW(model.parameters(), optimizer.lr, betas, optimizer.epsilon, optimizer.weight_decay, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)

    def step(micro_batches: Sequence[Batch]) -> Tensor:
        losses = []
        for batch in micro_batches:
            loss = model.layers.losses(engine(batch.tokens.to(engine.device)), batch.labels.to(engine.device)).mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


if __name__ == "__main__":
    from benchmarks.overhead import run_alone
    from launch.common import run_command

    run_command(lambda: run_alone(build, "deepspeed"))
