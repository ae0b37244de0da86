"""LongCat-Flash's zero-computation experts (arXiv 2509.01322): identity experts, and a controller of how many real ones run.

p = softmax over all of [W x, W_0 x], E experts and Z identity experts (x itself); choose the k largest of p + b, with b = 0
for the identity experts; g = p, times a constant. After each step b_e += rate·(1 - n_e/n), with n_e the expert's rows and
n = budget·k·T/E what it should have: it balances the experts, and steers to budget·k of them per token on average.

Scoring: linear softmax over experts and identity experts. Selection: k best of score + bias. Gate: score without bias.
Balancing: proportional steps of the bias towards a budget. Gradient estimator: the chosen experts.
"""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from moe.config.schema import NonNegativeFloat, PositiveFloat, PositiveInt, RouterConfig, config
from moe.routers._gates import gate
from moe.routers._null import null_weights
from moe.routers._parts import LinearRouter, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Counts, Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of routing with identity experts; LongCat-Flash has E=512, 256 of them, and k=12."""

    num_null: PositiveInt = 4
    """Identity experts (LongCat-Flash: E/2)."""
    budget: Annotated[float, Gt(0), Le(1)] = 2 / 3
    """Share of a token's k choices that are real experts, on average (LongCat-Flash: 8 of 12)."""
    bias_rate: NonNegativeFloat = 0.001
    """Step of the selection bias of an expert without rows."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies every weight."""

    source = (
        "b += µ·(budget/E - n_e/(k·T)), the same with µ = rate·E/budget; µ is not published, the rate is DeepSeek-V3's"
    )

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """Budget times K, once the bias has settled."""
        return self.budget * top_k

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """A vector per expert, identity experts included."""
        return (num_experts + self.num_null) * dim


class Router(LinearRouter):
    """Top-k over experts and identity experts; see the module's docstring."""

    weights_sum = "free"
    exact_rows = False
    bias_E: Tensor

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.null_weight_ZD = nn.Parameter(torch.empty(config.num_null, place["dim"]))
        self.register_buffer("bias_E", torch.zeros(place["num_experts"]))

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config, E = self.config, self.weight_ED.shape[0]
        logits_TE = linear_logits(x_TD, torch.cat((self.weight_ED, self.null_weight_ZD)))
        score_TE = logits_TE.softmax(1)
        biased_TE = score_TE.detach() + torch.nn.functional.pad(self.bias_E, (0, config.num_null))
        expert_TK = top_k(biased_TE, self.top_k, replay)
        weight_TK = gate(score_TE, expert_TK, normalize=False, scaling_factor=config.scaling_factor)
        passed_TZ = null_weights(expert_TK, weight_TK, E, config.num_null, tokens)
        return token_choice(
            expert_TK,
            weight_TK,
            tokens,
            num_experts=E,
            share_TE=score_TE,
            logits_TE=logits_TE,
            losses={},
            bypass_TD=passed_TZ.sum(1, keepdim=True) * x_TD,
        )

    @torch.no_grad()
    def update(self, statistics: Counts) -> None:
        counts_E = statistics["counts_E"]
        wanted = self.config.budget * self.top_k * statistics["token_sum"] / len(self.bias_E)
        self.bias_E += self.config.bias_rate * (1 - counts_E / wanted.clamp(min=1e-9))
