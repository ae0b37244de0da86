"""Parameter groups, the learning rate as a pure function of the step, and clipping."""

import math

import torch
from torch import Tensor, nn

from moe.config.schema import AdamW, Cosine, Schedule


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices; none for norms, biases, attention sinks and embeddings. Asserts that every parameter is in one group."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        (plain if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    assert {id(p) for p in decayed + plain} == {id(p) for p in model.parameters() if p.requires_grad}
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: AdamW) -> torch.optim.AdamW:
    """AdamW over all parameters; the learning rate is set before every step."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


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


def gradient_norm(model: nn.Module) -> Tensor:
    """Euclidean norm over all gradients, float32 scalar."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def clip(model: nn.Module, norm: Tensor, max_norm: float) -> None:
    """Scale all gradients so that their norm is at most max_norm; 0 leaves them alone."""
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(model.parameters()), max_norm, norm)
