"""SimBal (arXiv 2506.14038): balance from a router whose rows are orthonormal, instead of a loss on the load.

p = softmax(W x); choose the k most probable; g = p over the chosen, divided by their sum. Loss: Σ |W Wᵀ - I| over its
entries (Wᵀ W - I where E > D, whose rows cannot be orthonormal). Tokens that are alike keep being routed alike, and experts
stay distinct; the load is balanced only as far as the hidden states fill their space evenly.

Scoring: linear softmax. Selection: k best. Gate: renormalised. Balancing: orthogonality of W. Gradient estimator: the chosen
experts.
"""

import torch
from torch import Tensor

from moe.balance import z_loss
from moe.config.schema import NonNegativeFloat, RouterConfig, config
from moe.routers._gates import gate, refuse_constant_gate
from moe.routers._parts import LinearRouter, mean_over_tokens, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of similarity-preserving routing."""

    normalize: bool = True
    """Divide the chosen probabilities by their sum."""
    orthogonal_weight: NonNegativeFloat = 0.1
    """Coefficient of the distance of the router's rows from orthonormal ones."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "coefficient 0.1 on the entrywise L1 norm, which grows with E; not a loss on the load"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero."""
        refuse_constant_gate(top_k, self.normalize)


class Router(LinearRouter):
    """Top-k with an orthogonality loss; see the module's docstring."""

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.weights_sum = "one" if config.normalize else "at_most_one"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.softmax(1)
        expert_TK = top_k(score_TE, self.top_k, replay)
        # the same for every token, so that its mean over the step's tokens is itself in any layout
        distance_T = distance_from_orthonormal(self.weight_ED).expand(x_TD.shape[0])
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=config.normalize),
            tokens,
            num_experts=score_TE.shape[1],
            share_TE=score_TE,
            logits_TE=logits_TE,
            losses={
                "orthogonal": mean_over_tokens(distance_T, tokens, config.orthogonal_weight),
                "z": z_loss(logits_TE, tokens, config.z_weight),
            },
        )


def distance_from_orthonormal(weight_ED: Tensor) -> Tensor:
    """Entrywise L1 distance of W Wᵀ, or of Wᵀ W if that is smaller, from the identity; scalar."""
    smaller = weight_ED if weight_ED.shape[0] <= weight_ED.shape[1] else weight_ED.t()
    identity = torch.eye(smaller.shape[0], dtype=smaller.dtype, device=smaller.device)
    return (smaller @ smaller.t() - identity).abs().sum()
