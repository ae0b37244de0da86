"""Random routing, a control: every token of every step draws k distinct experts, each weighing 1/k.

The draw is a function of (seed, step, layer, row, position), so it is the same in every layout. It balances the load and
teaches the experts nothing in particular: a learned router that does no better is uninformative.

Scoring: random. Selection: k best. Gate: 1/k. Balancing: by chance. Gradient estimator: none needed.
"""

import torch
from torch import Tensor

from moe.config.schema import RouterConfig, config
from moe.random import mix, token_keys
from moe.routers._parts import token_choice
from moe.routers._select import top_k
from moe.routing import Router as BaseRouter
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Random routing has no settings."""

    source = "no loss"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """None: nothing is learned."""
        return 0


class Router(BaseRouter):
    """Uniformly random experts; see the module's docstring."""

    weights_sum = "one"
    label_E: Tensor

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int, layer: int, seed: int):
        super().__init__()
        self.top_k, self.layer, self.seed = top_k, layer, seed
        self.register_buffer("label_E", torch.arange(num_experts))

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        key_T = token_keys(tokens, seed=self.seed, layer=self.layer, purpose="random router")
        score_TE = ((mix(key_T.unsqueeze(1) + mix(self.label_E)) >> 40) & 0xFFFFFF).float() / 2**24
        expert_TK = top_k(score_TE, self.top_k, replay)
        share_TE = torch.full_like(score_TE, 1 / score_TE.shape[1])
        weight_TK = torch.full_like(expert_TK, 1 / self.top_k, dtype=torch.float32)
        return token_choice(
            expert_TK,
            weight_TK,
            tokens,
            num_experts=len(self.label_E),
            share_TE=share_TE,
            logits_TE=score_TE,
            losses={},
        )
