"""SMEBU, soft-clamped momentum updates of the selection bias (Arcee Trinity Large report, 2026).

Routing is `loss_free`'s: sigmoid scores, the k largest of score + b. Only the update of b differs: with the relative lack of
rows v = (mean load - load)/mean load, Δ = rate·tanh(kappa·v), made to sum to zero; m = momentum·m + Δ; b += m. Near balance
the steps shrink with v, where sign steps of a fixed size would go back and forth. The report writes (1 - momentum)·Δ, the same
with a rate 1/(1 - momentum) times as large: at its rate the bias would move half as fast as by sign steps of 0.001, here as
fast, which is what makes it the quicker of the two.

Scoring: linear, sigmoid or sqrt(softplus). Selection: k best of score + bias, in the best groups. Gate: score without bias,
renormalised. Balancing: smooth steps of the bias, sequence-wise loss. Gradient estimator: as loss_free.
"""

import torch
from torch import Tensor

from moe.config.schema import NonNegativeFloat, OpenFraction, PositiveFloat, config
from moe.routers import loss_free
from moe.routers._bias import load_lack


@config
class Config(loss_free.Config):
    """Settings of loss-free balancing with SMEBU's update."""

    bias_rate: NonNegativeFloat = 0.0005
    """Largest Δ; while loads stay far from balance, a bias moves by rate/(1 - momentum) per step."""
    kappa: PositiveFloat = 2.0
    """How steeply a step grows with the relative lack of rows."""
    momentum: OpenFraction = 0.5
    """Share of the last step in the next one."""

    source = (
        "rate 0.0005, kappa 2, momentum 0.5 as Trinity Large, whose m averages (1 - momentum)·Δ: its bias moves half as far, "
        "bias_rate=0.00025 here; complementary loss as DeepSeek-V3"
    )


class Router(loss_free.Router):
    """Loss-free routing with smooth bias steps; see the module's docstring."""

    momentum_E: Tensor

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.register_buffer("momentum_E", torch.zeros(place["num_experts"]))

    def bias_step(self, counts_E: Tensor) -> Tensor:
        config = self.config
        step_E = config.bias_rate * torch.tanh(config.kappa * load_lack(counts_E))
        self.momentum_E.mul_(config.momentum).add_(step_E - step_E.mean())
        return self.momentum_E
