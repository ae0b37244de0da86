"""GShard's top-2 with a random second expert (arXiv 2006.16668, algorithm 1).

p = softmax(W x); choose the k most probable (2 in the paper); g = p over the chosen, divided by their sum. In training every
choice after the first is kept only with probability min(1, 2·g), so that weak ones do not take up capacity; it is not
renormalised. An expert takes at most its balanced number of rows of a batch row (2·S/E at k = 2), later tokens are dropped.
The balance loss counts first choices only, within each batch row.

Scoring: linear softmax. Selection: best, and the others by chance, within capacity. Gate: renormalised. Balancing: loss on
first choices. Gradient estimator: the chosen experts.
"""

import torch
from torch import Tensor

from moe.config.schema import Balance, NonNegativeFloat, RouterConfig, config
from moe.errors import ConfigError
from moe.random import token_keys, uniform
from moe.routers._gates import gate, refuse_constant_gate
from moe.routers._parts import LinearRouter, choice_balance, kept_rows, row_needs, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of GShard's router."""

    normalize: bool = True
    """Divide the chosen probabilities by their sum."""
    balance: Balance = Balance(weight=0.01, scope="sequence")
    """Load-balancing loss over first choices; not in scope `global`, whose counts are of all choices."""
    capacity_factor: NonNegativeFloat = 1.0
    """Rows an expert takes from a batch row, over the balanced number; later tokens are dropped. 0: dropless."""

    source = (
        "l_aux = mean over experts of c/S·m in groups of S tokens, 1/E² at balance; the paper does not give its "
        "coefficient, 0.01 is Switch's"
    )

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, or less where capacity cannot hold the balanced load; training drops some choices by chance, besides."""
        return kept_rows(top_k, self.capacity_factor)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero, and counts that the loss cannot have."""
        refuse_constant_gate(top_k, self.normalize)
        if self.balance.scope == "global":
            raise ConfigError("gshard's balance loss counts first choices, which scope 'global' cannot: use 'sequence'")

    def whole_rows(self, *, part: int) -> str:
        """Capacity is over a row."""
        return row_needs(part, capacity_factor=self.capacity_factor)


class Router(LinearRouter):
    """Top-k whose weaker choices are left to chance; see the module's docstring."""

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.weights_sum = "at_most_one"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.softmax(1)
        expert_TK = top_k(score_TE, self.top_k, replay)
        weight_TK = gate(score_TE, expert_TK, normalize=config.normalize)
        return token_choice(
            expert_TK,
            weight_TK,
            tokens,
            num_experts=score_TE.shape[1],
            keep_TK=self._kept(weight_TK.detach(), tokens) if self.training else None,
            capacity_factor=config.capacity_factor,
            share_TE=score_TE,
            logits_TE=logits_TE,
            losses={"balance": choice_balance(score_TE, expert_TK[:, :1], tokens, config.balance, self.layer)},
        )

    def _kept(self, weight_TK: Tensor, tokens: Tokens) -> Tensor:
        """The first choice, and each other with probability min(1, 2·weight) [T, K]."""
        key_T = token_keys(tokens, seed=self.seed, layer=self.layer, purpose="gshard second expert")
        kept_TK = uniform(key_T, weight_TK.shape[1]) < 2 * weight_TK
        return kept_TK | (torch.arange(weight_TK.shape[1], device=weight_TK.device) == 0)
