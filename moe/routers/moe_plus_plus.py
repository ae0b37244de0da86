"""MoE++ (arXiv 2410.07348): besides the E experts there are ones that cost nothing, and easy tokens may take those.

p = softmax over all of [W x, W_0 x]; choose the k most probable; g = p. A zero expert gives 0, a copy expert x, a constant
expert a_1·x + a_2·v with (a_1, a_2) = softmax(W_c x) and v learned. Balance loss Z·Σ_i η_i f_i P_i with η = 1 for an expert and
tau for the others, Z = Σ 1/η: it is 1.0 where the f_i are 1/(η_i·Z), so with tau < 1 those others take more. Left out: the
gate's residual from the layer below, and the capacity; the released code's scaling of its input by k is not in the paper.

Scoring: linear softmax over experts and zero-cost experts. Selection: k best. Gate: full probability. Balancing:
heterogeneous loss. Gradient estimator: the chosen experts.
"""

import torch
from torch import Tensor, nn

from moe.config.schema import Balance, NonNegativeInt, PositiveFloat, RouterConfig, config
from moe.errors import ConfigError
from moe.routers._gates import gate
from moe.routers._null import null_weights
from moe.routers._parts import LinearRouter, choice_balance, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of MoE++; the defaults are those of its 0.6B model with 8 experts."""

    num_zero: NonNegativeInt = 1
    """Zero experts."""
    num_copy: NonNegativeInt = 1
    """Copy experts."""
    num_constant: NonNegativeInt = 2
    """Constant experts."""
    tau: PositiveFloat = 0.75
    """Weight of the zero-cost experts in the balance loss; less sends them more."""
    balance: Balance = Balance(weight=0.0015, scope="sequence")
    """Heterogeneous load-balancing loss; not in scope `global`, whose counts are of the E experts alone."""

    source = (
        "0.01 and tau 0.75 on Σ η·f·P with f not divided by K: that times K/Z is ours, Z = E + others/tau; "
        "0.0015 for the paper's K=2, E=8 and 4 others"
    )

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K times the experts' share of the choices at balance, E/(E + others/tau)."""
        return top_k * num_experts / (num_experts + self._others / self.tau)

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """A vector per expert of any kind; a constant expert has its constant and two vectors for its mixture."""
        return (num_experts + self._others + 3 * self.num_constant) * dim

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router without zero-cost experts, and counts that the loss cannot have."""
        if not self._others:
            raise ConfigError("num_zero, num_copy and num_constant are all 0, which is plain top-k: use router=topk")
        if self.balance.scope == "global":
            raise ConfigError("moe_plus_plus balances zero-cost experts, which scope 'global' cannot: use 'sequence'")

    @property
    def _others(self) -> int:
        return self.num_zero + self.num_copy + self.num_constant


class Router(LinearRouter):
    """Top-k over experts and zero-cost experts; see the module's docstring."""

    weights_sum = "at_most_one"
    exact_rows = False

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        others = config.num_zero + config.num_copy + config.num_constant
        self.null_weight_ZD = nn.Parameter(torch.empty(others, place["dim"]))
        self.constant_CD = nn.Parameter(torch.empty(config.num_constant, place["dim"]))
        self.mixture_CD = nn.Parameter(torch.empty(2 * config.num_constant, place["dim"]))

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config, E = self.config, self.weight_ED.shape[0]
        logits_TE = linear_logits(x_TD, torch.cat((self.weight_ED, self.null_weight_ZD)))
        score_TE = logits_TE.softmax(1)
        expert_TK = top_k(score_TE, self.top_k, replay)
        weight_TK = gate(score_TE, expert_TK, normalize=False)
        is_expert_E = torch.arange(score_TE.shape[1], device=score_TE.device) < E
        eta_E = torch.where(is_expert_E, 1.0, config.tau)
        weighed_TE = score_TE * (eta_E * (1 / eta_E).mean())
        return token_choice(
            expert_TK,
            weight_TK,
            tokens,
            num_experts=E,
            share_TE=score_TE,
            logits_TE=logits_TE,
            losses={"balance": choice_balance(weighed_TE, expert_TK, tokens, config.balance, self.layer)},
            bypass_TD=self._bypass(x_TD.to(score_TE.dtype), expert_TK, weight_TK, tokens),
        )

    def _bypass(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, tokens: Tokens) -> Tensor:
        """What the copy and constant experts give, weighted; the zero experts, which come first, give nothing."""
        first = self.weight_ED.shape[0] + self.config.num_zero
        copies, constants = self.config.num_copy, self.config.num_constant
        copied_T1 = null_weights(expert_TK, weight_TK, first, copies, tokens).sum(1, keepdim=True)
        constant_TC = null_weights(expert_TK, weight_TK, first + copies, constants, tokens)
        mixture_TC2 = linear_logits(x_TD, self.mixture_CD).unflatten(1, (constants, 2)).softmax(2)
        kept_T1 = copied_T1 + (constant_TC * mixture_TC2[:, :, 0]).sum(1, keepdim=True)
        return kept_T1 * x_TD + (constant_TC * mixture_TC2[:, :, 1]) @ self.constant_CD.to(x_TD.dtype)
