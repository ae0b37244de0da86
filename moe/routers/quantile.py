"""Quantile balancing: the selection bias that would have balanced the last step, found from quantiles ("MoE tour", 6 to 8).

Routing is `loss_free`'s with the bias -β: choose the k largest of sigmoid(W x) - β. Balanced assignment of scores s has a
dual: a price α_t per token and β_e per expert with s - α - β > 0 exactly where assigned. One round of its coordinate descent
per optimizer step: α_t = the (k+1)-th largest of s - β in the token's row; β_e = what a share k/E of s - α exceeds in the
expert's column, over all tokens of the step. A few steps balance any fixed scores, without a rate to tune; β is one step late.
The quantile comes from a histogram, which adds up over micro-batches and ranks.

Scoring: linear sigmoid. Selection: k best of score - β. Gate: score, renormalised. Balancing: quantiles of the last step.
Gradient estimator: chosen, DenseMixer or default vectors.
"""

import torch
from torch import Tensor

from moe.balance import z_loss
from moe.config.schema import NonNegativeFloat, OpenFraction, PositiveFloat, RouterConfig, config
from moe.routers._bias import histogram, upper_quantile
from moe.routers._estimators import Straight, estimator_rows, hears_of_others
from moe.routers._gates import gate, refuse_constant_gate
from moe.routers._parts import LinearRouter, row_needs, token_choice
from moe.routers._scores import linear_logits, shares
from moe.routers._select import top_k
from moe.routing import Counts, Routing, Selection, Tokens

LOW, HIGH = -2.0, 2.0
"""Range of s - α: scores are in (0, 1), and so are the differences of β that matter."""


@config
class Config(RouterConfig):
    """Settings of quantile balancing; the defaults are the published form: no memory, no loss."""

    memory: OpenFraction = 0.0
    """Weight of the old β in the new one; more is steadier and slower (0.9 for small batches)."""
    normalize: bool = True
    """Divide the chosen scores by their sum."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies every weight."""
    estimator: Straight = "chosen"
    """What teaches the router; moe/routers/_estimators.py. dense_mixer computes all experts (E/K of the FLOPs)."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "no loss; β from the last step's quantiles, exact there, from a histogram of 2048 bins here"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, and what an estimator computes besides."""
        return top_k + estimator_rows(self.estimator, num_experts=num_experts, top_k=top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero."""
        refuse_constant_gate(top_k, self.normalize and not hears_of_others(self.estimator))

    def whole_rows(self, *, part: int) -> str:
        """Stand-ins are over a row."""
        return row_needs(part, estimator=self.estimator)


class Router(LinearRouter):
    """Top-k of score minus the expert's price; see the module's docstring."""

    price_E: Tensor

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.register_buffer("price_E", torch.zeros(place["num_experts"]))
        self.weights_sum = "one" if config.normalize and config.scaling_factor == 1 else "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config, E = self.config, self.weight_ED.shape[0]
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.sigmoid()
        priced_TE = score_TE.detach() - self.price_E
        expert_TK = top_k(priced_TE, self.top_k, replay)
        bar_T1 = priced_TE.topk(min(self.top_k + 1, E), dim=1).values[:, -1:]
        routing = token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=config.normalize, scaling_factor=config.scaling_factor),
            tokens,
            num_experts=E,
            share_TE=shares("sigmoid", score_TE),
            logits_TE=logits_TE,
            losses={"z": z_loss(logits_TE, tokens, config.z_weight)},
            statistics={"excess_EQ": histogram(score_TE.detach() - bar_T1, tokens, LOW, HIGH)},
        )
        return self.with_estimator(routing, score_TE, expert_TK, tokens, normalize=config.normalize)

    @torch.no_grad()
    def update(self, statistics: Counts) -> None:
        super().update(statistics)
        E = self.weight_ED.shape[0]
        price_E = upper_quantile(statistics["excess_EQ"], self.top_k / E, LOW, HIGH)
        memory = self.config.memory
        self.price_E.mul_(memory).add_((1 - memory) * (price_E - price_E.mean()))
