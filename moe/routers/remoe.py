"""ReMoE (arXiv 2412.14711): the gate is a ReLU, so the number of experts of a token is learned and the router is smooth.

g = ReLU(W x); an expert is active where g > 0. The number of active experts is steered to k per token by λ·R, with R Switch's
formula over the gates, E·Σ_e f_e·mean_t g_te: after each step λ is multiplied by 1.2 if more than k·T rows were active, and
divided by 1.2 if not (equation 8). A model starts near E/2 active experts and thins out: early steps cost more.
λ is one number per layer here, and one for the model in the paper.

Scoring: linear ReLU. Selection: every positive score. Gate: the score. Balancing: L1 with adaptive weight. Gradient
estimator: none needed, the gate is continuous.
"""

import torch
from torch import Tensor

from moe.config.schema import Balance, NonNegativeInt, PositiveFloat, RouterConfig, config
from moe.routers._gates import gate
from moe.routers._parts import LinearRouter, choice_balance, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import above, check_limit
from moe.routing import Counts, Loss, Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of ReLU routing; the defaults are the paper's."""

    start: PositiveFloat = 1e-8
    """First value of λ."""
    factor: PositiveFloat = 1.2
    """What λ is multiplied with or divided by after each step."""
    max_experts: NonNegativeInt = 0
    """Most experts of one token, the strongest; 0 for all. Rows are allocated for so many."""

    source = (
        "λ from 1e-8, times or over 1.2 a step, as ReMoE; f is divided by the active rows here, by k·T there, "
        "the same once k experts are active"
    )

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, once λ has settled."""
        return float(top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a bound that the target does not fit."""
        check_limit(self.max_experts, num_experts, top_k)


class Router(LinearRouter):
    """ReLU gates; see the module's docstring."""

    weights_sum = "free"
    exact_rows = False
    coefficient: Tensor

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.register_buffer("coefficient", torch.tensor(config.start))

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        E = self.weight_ED.shape[0]
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.relu()
        expert_TK = above(score_TE.detach(), 0.0, self.config.max_experts or E, replay)
        l1 = choice_balance(score_TE, expert_TK, tokens, Balance(weight=1.0, scope="sequence"), self.layer).value
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=False),
            tokens,
            num_experts=E,
            share_TE=score_TE / score_TE.sum(1, keepdim=True).clamp(min=1e-20),
            logits_TE=logits_TE,
            losses={"l1": Loss(l1.detach(), 0.0), "l1_scaled": Loss(self.coefficient * l1, 1.0)},
        )

    @torch.no_grad()
    def update(self, statistics: Counts) -> None:
        too_many = statistics["counts_E"].sum() > self.top_k * statistics["token_sum"]
        factor = self.config.factor
        self.coefficient.mul_(torch.where(too_many, factor, 1 / factor))
