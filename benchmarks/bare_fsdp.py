"""Plain FSDP2, without this project's backend and loop: `torchrun --nproc-per-node 2 benchmarks/bare_fsdp.py --config FILE`.

The baseline of launch/pretrain.py in benchmarks/overhead.py: forward, backward and step, nothing else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository instead of benchmarks/

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from configs.schema import Config
from data_pipeline.read.loader import Batch
from model.build import build_model
from model.initialization import init_weights


def build(config: Config) -> Callable[[Sequence[Batch]], Tensor]:
    """A function that takes one optimizer step over a rank's micro-batches and returns their losses."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = build_model(config.model).to(device)
    init_weights(model, config.run.seed)
    for block in model.block_modules():
        fully_shard(block)
    fully_shard(model)
    optimizer, limit = config.optimizer, config.training.gradient_clipping
    betas = optimizer.beta1, optimizer.beta2
    adam = torch.optim.AdamW(model.parameters(), optimizer.lr, betas, optimizer.epsilon, optimizer.weight_decay, fused=True)

    def step(micro_batches: Sequence[Batch]) -> Tensor:
        losses = []
        for batch in micro_batches:
            loss = model.layers.losses(model(batch.tokens.to(device)), batch.labels.to(device)).mean()
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        adam.step()
        adam.zero_grad()
        return torch.stack(losses)

    return step


if __name__ == "__main__":
    from benchmarks.overhead import run_alone
    from launch.common import run_command

    run_command(lambda: run_alone(build, "fsdp"))
