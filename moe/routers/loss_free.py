"""Auxiliary-loss-free balancing (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437 section 2.1.2).

Score s = sigmoid(W x); choose the k largest of s + b; gate g = s over the chosen, divided by their sum, times a constant.
After each optimizer step b_e += rate·sign(mean load - load_e), with loads of the whole global batch. The bias b is in the
selection only: never in the gate, and without gradient. A sequence-wise balance loss of small weight is DeepSeek-V3's
safeguard. With groups, a token chooses within the groups whose two best biased scores have the largest sum.

Scoring: linear, sigmoid or sqrt(softplus). Selection: k best of score + bias, in the best groups. Gate: score without bias,
renormalised. Balancing: sign steps of the bias, sequence-wise loss. Gradient estimator: chosen, DenseMixer, default vectors.
"""

from typing import Literal

import torch
from torch import Tensor

from moe.config.schema import Balance, NonNegativeFloat, PositiveFloat, PositiveInt, RouterConfig, config
from moe.routers._bias import load_sign
from moe.routers._choice import choose
from moe.routers._estimators import Straight, estimator_rows, hears_of_others
from moe.routers._gates import refuse_constant_gate
from moe.routers._parts import LinearRouter, balance_and_z, kept_rows, row_needs, token_choice
from moe.routers._scores import linear_logits, shares
from moe.routers._select import check_groups
from moe.routing import Counts, Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of loss-free balancing; the defaults are DeepSeek-V3's, without its groups and with scaling factor 1."""

    score: Literal["sigmoid", "sqrt_softplus"] = "sigmoid"
    """Score of each expert: a sigmoid of its logit, or the root of a softplus."""
    num_groups: PositiveInt = 1
    """Equal groups of experts, devices in the paper (DeepSeek-V3: 8); 1 for no limit."""
    top_groups: PositiveInt = 1
    """Groups that a token may use (DeepSeek-V3: 4)."""
    bias_rate: NonNegativeFloat = 0.001
    """Step of the selection bias after each optimizer step."""
    normalize: bool = True
    """Divide the chosen scores by their sum."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies every weight (DeepSeek-V3: 2.5)."""
    estimator: Straight = "chosen"
    """What teaches the router; moe/routers/_estimators.py. dense_mixer computes all experts (E/K of the FLOPs)."""
    balance: Balance = Balance(weight=0.0001, scope="sequence")
    """Complementary load-balancing loss."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""
    capacity_factor: NonNegativeFloat = 0.0
    """Rows an expert takes from a batch row, over the balanced number; later tokens are dropped. 0: dropless."""

    source = "bias_rate 0.001 and sequence-wise balance 0.0001 as DeepSeek-V3, whose f is divided by K as ours is"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, or less where capacity cannot hold the balanced load, and what an estimator computes besides."""
        return kept_rows(top_k, self.capacity_factor) + estimator_rows(
            self.estimator, num_experts=num_experts, top_k=top_k
        )

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero, and groups that do not fit."""
        refuse_constant_gate(top_k, self.normalize and not hears_of_others(self.estimator))
        check_groups(num_experts, top_k, self.num_groups, self.top_groups)

    def whole_rows(self, *, part: int) -> str:
        """Capacity and stand-ins are over a row."""
        return row_needs(part, capacity_factor=self.capacity_factor, estimator=self.estimator)


class Router(LinearRouter):
    """Top-k router with a selection bias; see the module's docstring."""

    bias_E: Tensor

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.register_buffer("bias_E", torch.zeros(place["num_experts"]))
        self.weights_sum = "one" if config.normalize and config.scaling_factor == 1 else "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        weight_TK, expert_TK, score_TE = choose(
            config.score,
            logits_TE,
            self.top_k,
            replay,
            normalize=config.normalize,
            scaling_factor=config.scaling_factor,
            fused=self.fused,
            bias_E=self.bias_E,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
        )
        share_TE = shares(config.score, score_TE)
        routing = token_choice(
            expert_TK,
            weight_TK,
            tokens,
            num_experts=score_TE.shape[1],
            capacity_factor=config.capacity_factor,
            share_TE=share_TE,
            logits_TE=logits_TE,
            losses=balance_and_z(share_TE, logits_TE, expert_TK, tokens, config.balance, config.z_weight, self.layer),
        )
        return self.with_estimator(routing, score_TE, expert_TK, tokens, normalize=config.normalize)

    @torch.no_grad()
    def update(self, statistics: Counts) -> None:
        super().update(statistics)
        self.bias_E += self.bias_step(statistics["counts_E"])

    def bias_step(self, counts_E: Tensor) -> Tensor:
        """What the bias moves by after a step with these loads [E]."""
        return self.config.bias_rate * load_sign(counts_E)
