"""What the optimizer sees: which parameters decay, and the learning rate of each step."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from configs.schema import Config, OptimizerConfig
from model.attention.mhe import HEAD_EMBEDDINGS


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    config: OptimizerConfig,
    dimensions: Callable[[torch.nn.Parameter], int] = torch.Tensor.dim,
) -> torch.optim.AdamW:
    """AdamW whose weight decay spares norms, biases and head embeddings. `dimensions` says how many a whole parameter has.

    The parameters enter in the order of their names, so that every process and every resumed run builds the same state.
    """
    parameters = dict(named_parameters)
    decayed, spared = optimizer_order({name: dimensions(parameter) for name, parameter in parameters.items()})
    groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in decayed], "weight_decay": config.weight_decay},
        {"params": [parameters[name] for name in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def optimizer_order(dimensions: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Parameters of so many dimensions, in the optimizer's order: those that decay and those that are spared."""

    def spare(name: str) -> bool:
        return dimensions[name] < 2 or name.rpartition(".")[2] in HEAD_EMBEDDINGS

    names = sorted(dimensions)
    return [name for name in names if not spare(name)], [name for name in names if spare(name)]


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of a resolved config.

    Linear warmup to the peak, then `cosine` to min_lr_ratio * peak at the last step, or `wsd`: the peak until decay_steps
    before the end, then linear to min_lr_ratio * peak (Hu et al. 2024, MiniCPM).
    """
    schedule, steps, peak = config.schedule, config.training.steps, config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = peak * schedule.min_lr_ratio
    if schedule.kind == "cosine":
        progress = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    assert schedule.decay_steps is not None, "learning_rate needs a resolved config"
    progress = (step - (steps - schedule.decay_steps) + 1) / schedule.decay_steps
    return peak - (peak - floor) * min(1.0, max(0.0, progress))
