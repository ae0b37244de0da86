"""Top-p routing (arXiv 2403.07652): as many experts as it takes to reach a probability of p.

P = softmax(W x); choose the smallest set of most probable experts whose sum reaches p; g = P over the chosen. A token that
the router is sure of takes one expert, a hard one several. An entropy loss keeps P from staying flat, or every token would
take many. How many experts a token takes is learned: K is only what cost expects (the paper measures about 1.7 of 16).

Scoring: linear softmax. Selection: smallest set of mass p. Gate: full probability. Balancing: Switch's loss, entropy loss.
Gradient estimator: the chosen experts.
"""

from typing import Annotated

from annotated_types import Gt, Le
from torch import Tensor

from moe.config.schema import Balance, NonNegativeFloat, NonNegativeInt, RouterConfig, config
from moe.routers._gates import gate
from moe.routers._parts import LinearRouter, choice_balance, mean_over_tokens, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import check_limit, nucleus
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of top-p routing; the defaults are the paper's."""

    threshold: Annotated[float, Gt(0), Le(1)] = 0.4
    """p, the probability that the chosen experts reach together."""
    max_experts: NonNegativeInt = 0
    """Most experts of one token; 0 for all. Rows are allocated for so many."""
    entropy_weight: NonNegativeFloat = 0.0001
    """Coefficient of the mean entropy of P, in nats."""
    balance: Balance = Balance(weight=0.01, scope="global")
    """Load-balancing loss."""

    source = "balance 0.01 on E·Σ f·P with f over the chosen rows and entropy 0.0001, as the paper"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K: what the comparison with dense models assumes; the routing log has what it is."""
        return float(top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a bound that the expectation does not fit."""
        check_limit(self.max_experts, num_experts, top_k)


class Router(LinearRouter):
    """The smallest set of probability p; see the module's docstring."""

    weights_sum = "at_most_one"
    exact_rows = False

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config, E = self.config, self.weight_ED.shape[0]
        logits_TE = linear_logits(x_TD, self.weight_ED)
        share_TE = logits_TE.softmax(1)
        expert_TK = nucleus(share_TE.detach(), config.threshold, config.max_experts or E, replay)
        entropy_T = -(share_TE * logits_TE.log_softmax(1)).sum(1)
        return token_choice(
            expert_TK,
            gate(share_TE, expert_TK, normalize=False),
            tokens,
            num_experts=E,
            share_TE=share_TE,
            logits_TE=logits_TE,
            losses={
                "balance": choice_balance(share_TE, expert_TK, tokens, config.balance, self.layer),
                "entropy": mean_over_tokens(entropy_T, tokens, config.entropy_weight),
            },
        )
