"""The learning rate as a pure function of the step."""

import math

from moe.config.schema import Cosine, Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) out of `steps`: warm-up reaches the peak at step warmup_steps-1.

    Cosine ends at final_fraction·peak in the last step; WSD falls linearly to it over the last decay_steps.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    low = schedule.final_fraction
    if isinstance(schedule, Cosine):
        span = steps - 1 - schedule.warmup_steps
        progress = (step - schedule.warmup_steps) / span if span > 0 else 1.0
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
    left = steps - step  # 1 in the last step
    if left > schedule.decay_steps:
        return peak
    return peak * (low + (1 - low) * (left - 1) / schedule.decay_steps)
