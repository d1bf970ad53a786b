"""The learning rate of each step, a function of the step alone."""

import math

from configs.schema import Config


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of a resolved config.

    Linear warmup to the peak, then `cosine` to min_lr_ratio * peak at the last step, or `wsd`: the peak until decay_steps
    before the end, then linear to min_lr_ratio * peak (Hu et al. 2024, MiniCPM). A run of a single step takes the peak.
    """
    schedule, steps, peak = config.schedule, config.training.steps, config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = peak * schedule.min_lr_ratio
    if schedule.kind == "cosine":
        left = steps - 1 - schedule.warmup_steps  # from the peak to the last step
        progress = (step - schedule.warmup_steps) / left if left else float(step > 0)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    assert schedule.decay_steps is not None, "learning_rate needs a resolved config"
    progress = (step - (steps - schedule.decay_steps) + 1) / schedule.decay_steps
    return peak - (peak - floor) * min(1.0, max(0.0, progress))
