"""Same-batch quantile balancing, a control for `quantile`: prices that balance each row of the batch itself.

s = sigmoid(W x). Within each batch row, prices β start at 0 and are improved a few times: α_t = the (k+1)-th largest of
s - β in the token's row, β_e = half way from the S·k/E-th to the next largest of s - α in the expert's column; then choose
the k largest of s - β. The gate is s over the chosen, divided by their sum. NOT CAUSAL: the prices come from the whole row.
What it gains over `quantile`, which takes the last step's prices, is what looking ahead and row-wise balance are worth.

Scoring: linear sigmoid. Selection: k best of score - β of the same row. Gate: score, renormalised. Balancing: quantiles of
the same row. Gradient estimator: the chosen experts.
"""

from torch import Tensor

from moe.balance import z_loss
from moe.config.schema import NonNegativeFloat, PositiveInt, RouterConfig, config
from moe.routers._gates import gate, refuse_constant_gate
from moe.routers._parts import LinearRouter, token_choice
from moe.routers._scores import linear_logits, shares
from moe.routers._select import row_prices, top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of same-batch quantile balancing."""

    iterations: PositiveInt = 4
    """Times that the prices are improved."""
    normalize: bool = True
    """Divide the chosen scores by their sum."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "no loss"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero."""
        refuse_constant_gate(top_k, self.normalize)

    def whole_rows(self, *, part: int) -> str:
        """Prices are those of a row."""
        return "prices balance each row: use router quantile"


class Router(LinearRouter):
    """Top-k of score minus the row's price; see the module's docstring."""

    causal = False

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.weights_sum = "one" if config.normalize else "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.sigmoid()
        price_TE = row_prices(score_TE.detach(), tokens, self.top_k, config.iterations)
        expert_TK = top_k(score_TE.detach() - price_TE, self.top_k, replay)
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=config.normalize),
            tokens,
            num_experts=score_TE.shape[1],
            share_TE=shares("sigmoid", score_TE),
            logits_TE=logits_TE,
            losses={"z": z_loss(logits_TE, tokens, config.z_weight)},
        )
