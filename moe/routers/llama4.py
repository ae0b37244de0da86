"""Llama 4's router: a sigmoid of the best logit multiplies the expert's input.

z = W x; choose the k largest (1 in the published models, beside a shared expert); y = E_e(sigmoid(z_e)·x). The expert is
not linear, so this is not the same as weighting its output.

Scoring: linear. Selection: k best. Gate: sigmoid, on the input. Balancing: loss. Gradient estimator: the chosen experts,
through the expert itself.
"""

from torch import Tensor

from moe.config.schema import Balance, NonNegativeFloat, RouterConfig, config
from moe.routers._gates import gate
from moe.routers._parts import LinearRouter, balance_and_z, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of routing with gated inputs."""

    balance: Balance = Balance(weight=0.001, scope="global")
    """Load-balancing loss, over the softmax of the logits."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "how Llama 4 was balanced is not published; transformers' config has router_aux_loss_coef 0.001 at K=1"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)


class Router(LinearRouter):
    """Top-k with the gate on the expert's input; see the module's docstring."""

    weights_sum = "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        share_TE = logits_TE.softmax(1)
        expert_TK = top_k(logits_TE, self.top_k, replay)
        return token_choice(
            expert_TK,
            gate(logits_TE.sigmoid(), expert_TK, normalize=False),
            tokens,
            num_experts=logits_TE.shape[1],
            share_TE=share_TE,
            logits_TE=logits_TE,
            weight_on="input",
            losses=balance_and_z(share_TE, logits_TE, expert_TK, tokens, config.balance, config.z_weight, self.layer),
        )
