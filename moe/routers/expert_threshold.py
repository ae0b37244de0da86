"""Expert threshold (arXiv 2603.11535): an expert takes every token whose score passes its own bar. Causal expert choice.

s = sigmoid(W x); token t goes to expert e where s_te > θ_e; the gate is s_te. θ_e is an exponential moving average over the
steps of the score that a share k/E of all tokens exceeds, so each expert takes k·T/E rows in expectation, and a token 0 to
E of them. Unlike expert choice, nothing depends on the other tokens of the batch. Until the first update there is no
bar, and every token takes its k best. The quantile comes from a histogram, which adds up over micro-batches and ranks.

Scoring: linear sigmoid. Selection: score above the expert's bar. Gate: score. Balancing: the bars. Gradient estimator: the
chosen experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.balance import z_loss
from moe.config.schema import NonNegativeFloat, NonNegativeInt, OpenFraction, RouterConfig, config
from moe.routers._bias import histogram, upper_quantile
from moe.routers._gates import gate
from moe.routers._parts import LinearRouter, token_choice
from moe.routers._scores import linear_logits, shares
from moe.routers._select import above, check_limit
from moe.routing import Counts, Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of expert threshold routing."""

    memory: OpenFraction = 0.99
    """Weight of the old bar in the new one, after each step."""
    max_experts: NonNegativeInt = 0
    """Most experts of one token, the best ones; 0 for all. Rows are allocated for so many."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "no loss; the decay of the bars is not from the paper"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, in expectation."""
        return float(top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a bound that the expectation does not fit."""
        check_limit(self.max_experts, num_experts, top_k)


class Router(LinearRouter):
    """Experts with a bar each; see the module's docstring."""

    weights_sum = "free"
    exact_rows = False
    bar_E: Tensor
    started: Tensor

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.register_buffer("bar_E", torch.zeros(place["num_experts"]))
        self.register_buffer("started", torch.zeros(()))

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config, E = self.config, self.weight_ED.shape[0]
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.sigmoid()
        # before the first update a token's bar is its own (k+1)-th best score, which k experts pass
        own_T1 = F.pad(score_TE.detach(), (0, 1)).topk(self.top_k + 1, dim=1).values[:, -1:]
        bar_TE = torch.where(self.started > 0, self.bar_E, own_T1)
        expert_TK = above(score_TE.detach(), bar_TE, config.max_experts or E, replay)
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=False),
            tokens,
            num_experts=E,
            share_TE=shares("sigmoid", score_TE),
            logits_TE=logits_TE,
            losses={"z": z_loss(logits_TE, tokens, config.z_weight)},
            statistics={"score_EQ": histogram(score_TE.detach(), tokens, 0.0, 1.0)},
        )

    @torch.no_grad()
    def update(self, statistics: Counts) -> None:
        bar_E = upper_quantile(statistics["score_EQ"], self.top_k / self.weight_ED.shape[0], 0.0, 1.0)
        memory = self.config.memory * self.started
        self.bar_E.mul_(memory).add_((1 - memory) * bar_E)
        self.started.fill_(1.0)
