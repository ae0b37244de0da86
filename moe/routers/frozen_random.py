"""A frozen random router on hidden states, a control: W is drawn once and never learned.

z = W x with W ~ N(0, 1/D), so that normalised hidden states give logits of unit variance; choose the k largest; g = softmax
over the chosen. Nothing keeps the load even, and a token's experts move as its hidden state does. A learned router that
does no better owes its gain to the experts alone; `hash` is the control whose tokens keep their experts.

Scoring: linear, frozen. Selection: k best. Gate: softmax over the chosen. Balancing: none. Gradient estimator: none needed.
"""

import torch
from torch import Tensor

from moe.config.schema import RouterConfig, config
from moe.random import stable_seed
from moe.routers._gates import gate
from moe.routers._parts import token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Router as BaseRouter
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """A frozen router has no settings."""

    source = "no loss"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """None: nothing is learned."""
        return 0


class Router(BaseRouter):
    """Top-k of random projections; see the module's docstring."""

    weights_sum = "one"
    frozen_ED: Tensor

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int, layer: int, seed: int):
        super().__init__()
        self.top_k = top_k
        generator = torch.Generator("cpu").manual_seed(stable_seed(seed, layer, "frozen router"))
        frozen_ED = torch.randn(num_experts, dim, generator=generator, device="cpu") / dim**0.5
        self.register_buffer("frozen_ED", frozen_ED)

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        logits_TE = linear_logits(x_TD, self.frozen_ED)
        score_TE = logits_TE.softmax(1)
        expert_TK = top_k(score_TE, self.top_k, replay)
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=True),
            tokens,
            num_experts=score_TE.shape[1],
            share_TE=score_TE,
            logits_TE=logits_TE,
            losses={},
        )
