"""Switch (arXiv 2101.03961): one expert per token, weighted by its probability among all experts.

p = softmax(W x') with x' = x·U(1 ± 0.01) in training; choose the most probable expert (top_k = 1 in the paper; more is
allowed here); y = p_e·E_e(x); an expert takes at most 1.25 times the balanced number of rows, later tokens are dropped.
This is `topk` with other defaults, and no other code.

Scoring: linear softmax, input jitter in training. Selection: k best, within capacity. Gate: full probability. Balancing:
Switch's loss. Gradient estimator: the chosen experts.
"""

from typing import Literal

from moe.config.schema import Balance, NonNegativeFloat, config
from moe.routers import topk


@config
class Config(topk.Config):
    """Settings of top-k routing, with Switch's defaults; its router initialisation (scale 0.1) is not taken over."""

    gate: Literal["full", "selected"] = "full"
    """Weights are the chosen probabilities, or those divided by their sum."""
    noise: Literal["none", "jitter", "gaussian"] = "jitter"
    """In training only: multiply the router's input by U(1-scale, 1+scale), or add scale·N(0, 1) to the logits."""
    noise_scale: NonNegativeFloat = 0.01
    """Size of the noise."""
    balance: Balance = Balance(weight=0.01, scope="global")
    """Load-balancing loss."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""
    capacity_factor: NonNegativeFloat = 1.25
    """Rows an expert takes from a batch row, over the balanced number; later tokens are dropped. 0: dropless."""

    source = (
        "alpha 0.01 on E·Σ f·P, 1.0 at balance as ours; f counted over a device's batch there, over the step here "
        "(scope micro_batch is the paper's); capacity 1.25 of a device's batch there, of a batch row here"
    )


Router = topk.Router
