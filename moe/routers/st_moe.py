"""ST-MoE (arXiv 2202.08906): top-2 with renormalised gates, capacity, and the z-loss that it introduced.

p = softmax(W x); choose the k most probable (2 in the paper); g = p over the chosen, divided by their sum; an expert takes
at most 1.25 (evaluation: 2.0) times the balanced number of rows of a batch row. Losses: balance, and the mean square of
logsumexp(W x), which keeps logits small enough for low precision (equation 5).

Scoring: linear softmax. Selection: k best, within capacity. Gate: renormalised. Balancing: Switch's loss and z-loss.
Gradient estimator: the chosen experts.
"""

from torch import Tensor

from moe.config.schema import Balance, NonNegativeFloat, RouterConfig, config
from moe.routers._gates import gate, refuse_constant_gate
from moe.routers._parts import LinearRouter, balance_and_z, kept_rows, row_needs, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of ST-MoE; the defaults are the paper's."""

    normalize: bool = True
    """Divide the chosen probabilities by their sum."""
    balance: Balance = Balance(weight=0.01, scope="global")
    """Load-balancing loss."""
    z_weight: NonNegativeFloat = 0.001
    """Coefficient of the router z-loss."""
    capacity_factor: NonNegativeFloat = 1.25
    """In training: rows an expert takes from a batch row, over the balanced number; later tokens are dropped. 0: dropless."""
    eval_capacity_factor: NonNegativeFloat = 2.0
    """The same outside training."""

    source = (
        "balance 0.01 on E·Σ f·P and z 0.001, 1.0 at balance as ours; f over a device's group of tokens there, over the "
        "step here; capacity of a group there, of a batch row here"
    )

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, or less where capacity cannot hold the balanced load."""
        return kept_rows(top_k, self.capacity_factor)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero."""
        refuse_constant_gate(top_k, self.normalize)

    def whole_rows(self, *, part: int) -> str:
        """Capacity is over a row, in evaluation too."""
        return row_needs(part, capacity_factor=self.capacity_factor, eval_capacity_factor=self.eval_capacity_factor)


class Router(LinearRouter):
    """Top-k with capacity and z-loss; see the module's docstring."""

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.weights_sum = "one" if config.normalize else "at_most_one"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.softmax(1)
        expert_TK = top_k(score_TE, self.top_k, replay)
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=config.normalize),
            tokens,
            num_experts=score_TE.shape[1],
            capacity_factor=config.capacity_factor if self.training else config.eval_capacity_factor,
            share_TE=score_TE,
            logits_TE=logits_TE,
            losses=balance_and_z(score_TE, logits_TE, expert_TK, tokens, config.balance, config.z_weight, self.layer),
        )
