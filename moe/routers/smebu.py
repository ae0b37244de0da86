"""SMEBU, soft-clamped momentum updates of the selection bias (Arcee Trinity Large report, 2026).

Routing is `loss_free`'s: sigmoid scores, the k largest of score + b. Only the update of b differs: with the relative lack of
rows v = (mean load - load)/mean load, Δ = rate·tanh(kappa·v), made to sum to zero; m = momentum·m + (1 - momentum)·Δ; b += m.
Near balance the steps shrink with v, where sign steps of a fixed size would go back and forth.

Scoring: linear, sigmoid or sqrt(softplus). Selection: k best of score + bias, in the best groups. Gate: score without bias,
renormalised. Balancing: smooth steps of the bias, sequence-wise loss. Gradient estimator: the chosen, or DenseMixer.
"""

import torch
from torch import Tensor

from moe.config.schema import NonNegativeFloat, OpenFraction, PositiveFloat, config
from moe.routers import loss_free
from moe.routers._bias import load_lack
from moe.routing import Counts


@config
class Config(loss_free.Config):
    """Settings of loss-free balancing with SMEBU's update."""

    bias_rate: NonNegativeFloat = 0.0005
    """Largest step of the selection bias after an optimizer step."""
    kappa: PositiveFloat = 2.0
    """How steeply a step grows with the relative lack of rows."""
    momentum: OpenFraction = 0.5
    """Decay of the running mean of the steps."""

    source = "rate 0.0005, kappa 2, momentum 0.5 as Trinity Large; complementary loss as DeepSeek-V3"


class Router(loss_free.Router):
    """Loss-free routing with smooth bias steps; see the module's docstring."""

    momentum_E: Tensor

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.register_buffer("momentum_E", torch.zeros(place["num_experts"]))

    @torch.no_grad()
    def update(self, statistics: Counts) -> None:
        config = self.config
        step_E = config.bias_rate * torch.tanh(config.kappa * load_lack(statistics["counts_E"]))
        self.momentum_E.mul_(config.momentum).add_((1 - config.momentum) * (step_E - step_E.mean()))
        self.bias_E += self.momentum_E
