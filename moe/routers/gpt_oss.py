"""gpt-oss's router (OpenAI 2025, arXiv 2508.10925): logits with a bias, softmax over the chosen.

z = W x + b with b learned; choose the k largest (4 in the published models); g = softmax over the chosen z. It is `topk`
with `selected` gates but for b. How the models were balanced is not published; the loss weights are `topk`'s.

Scoring: linear with learned bias. Selection: k best. Gate: softmax over the chosen. Balancing: loss, z-loss. Gradient
estimator: chosen, DenseMixer or default vectors.
"""

import torch
from torch import Tensor, nn

from moe.config.schema import Balance, NonNegativeFloat, RouterConfig, config
from moe.routers._estimators import Straight, estimator_rows, hears_of_others
from moe.routers._gates import gate, refuse_constant_gate
from moe.routers._parts import LinearRouter, balance_and_z, row_needs, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of a router with bias."""

    normalize: bool = True
    """Gate by the softmax over the chosen experts, as published, rather than over all of them."""
    estimator: Straight = "chosen"
    """What teaches the router; moe/routers/_estimators.py. dense_mixer computes all experts (E/K of the FLOPs)."""
    balance: Balance = Balance(weight=0.01, scope="global")
    """Load-balancing loss."""
    z_weight: NonNegativeFloat = 0.001
    """Coefficient of the router z-loss."""

    source = "balancing not published; transformers' GptOss class offers a loss of K times ours, coefficient 0.9"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, and what an estimator computes besides."""
        return top_k + estimator_rows(self.estimator, num_experts=num_experts, top_k=top_k)

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """A matrix and a bias."""
        return num_experts * (dim + 1)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero."""
        refuse_constant_gate(top_k, self.normalize and not hears_of_others(self.estimator))

    def whole_rows(self, *, part: int) -> str:
        """Stand-ins are over a row."""
        return row_needs(part, estimator=self.estimator)


class Router(LinearRouter):
    """Top-k of biased logits; see the module's docstring."""

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.logit_bias_E = nn.Parameter(torch.empty(place["num_experts"]))
        self.weights_sum = "one" if config.normalize else "at_most_one"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED, self.logit_bias_E)
        score_TE = logits_TE.softmax(1)
        expert_TK = top_k(logits_TE, self.top_k, replay)
        routing = token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=config.normalize),
            tokens,
            num_experts=score_TE.shape[1],
            share_TE=score_TE,
            logits_TE=logits_TE,
            losses=balance_and_z(score_TE, logits_TE, expert_TK, tokens, config.balance, config.z_weight, self.layer),
        )
        return self.with_estimator(routing, score_TE, expert_TK, tokens, normalize=config.normalize)
