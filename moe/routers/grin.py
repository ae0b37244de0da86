"""GRIN with SparseMixer-v2 (arXiv 2409.12136; Phi-3.5-MoE): experts are sampled in training, so that the gate has a gradient.

k times: leave out the logits with (max - z)/max(|z|, max) > 2·jitter, those that are not near the best; p = softmax of the
rest; in training sample an expert from p, in evaluation take the best; its weight is its p; mask it for the next turn.
In training the weight's value is multiplied by 1 where the best expert was sampled, and elsewhere by 1 with chance 1/4 and by
1/3 otherwise, its gradient left whole: Heun's third-order estimate of the gradient through the choice.

Scoring: linear. Selection: sampled without replacement (evaluation: best). Gate: softmax among the near-best. Balancing:
loss. Gradient estimator: SparseMixer-v2.
"""

import torch
from torch import Tensor

from moe.config.schema import Balance, NonNegativeFloat, PositiveFloat, RouterConfig, config
from moe.routers._estimators import sampled, scaled
from moe.routers._parts import LinearRouter, balance_and_z, token_choice
from moe.routers._scores import linear_logits
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of sampled routing; the defaults are Phi-3.5-MoE's."""

    jitter: PositiveFloat = 0.01
    """Half the relative distance from the best logit within which an expert takes part."""
    balance: Balance = Balance(weight=0.001, scope="global")
    """Load-balancing loss."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "balance over the global batch, as here, with a coefficient from 0.001 to 0.01"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)


class Router(LinearRouter):
    """Sampled experts; see the module's docstring."""

    weights_sum = "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config, K = self.config, self.top_k
        logits_TE = linear_logits(x_TD, self.weight_ED)
        forced_TK = None if replay is None else replay.expert_R.view(x_TD.shape[0], K)
        left_TE = logits_TE
        experts, weights = [], []
        for turn in range(K):
            p_TE = near_best(left_TE, logits_TE, config.jitter).softmax(1)
            expert_T, weight_T = self._choose(p_TE, tokens, turn, None if forced_TK is None else forced_TK[:, turn])
            left_TE = left_TE.scatter(1, expert_T.unsqueeze(1), float("-inf"))
            experts.append(expert_T)
            weights.append(weight_T)
        expert_TK = torch.stack(experts, 1)
        share_TE = logits_TE.softmax(1)
        return token_choice(
            expert_TK,
            torch.stack(weights, 1),
            tokens,
            num_experts=logits_TE.shape[1],
            share_TE=share_TE,
            logits_TE=logits_TE,
            losses=balance_and_z(share_TE, logits_TE, expert_TK, tokens, config.balance, config.z_weight, self.layer),
        )

    def _choose(self, p_TE: Tensor, tokens: Tokens, turn: int, forced_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """One expert per token and its weight."""
        if not self.training:
            expert_T = p_TE.topk(1, dim=1).indices.squeeze(1) if forced_T is None else forced_T
            return expert_T, p_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1)
        expert_T, factor_T = sampled(p_TE.detach(), tokens, turn, seed=self.seed, layer=self.layer, forced_T=forced_T)
        return expert_T, scaled(p_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1), factor_T)


def near_best(left_TE: Tensor, logits_TE: Tensor, jitter: float) -> Tensor:
    """Logits that are left, -inf where (best - z)/max(|z|, best) exceeds 2·jitter."""
    best_T1 = left_TE.detach().amax(1, keepdim=True)
    far_TE = (best_T1 - logits_TE.detach()) / torch.maximum(logits_TE.detach().abs(), best_T1) > 2 * jitter
    return left_TE.masked_fill(far_TE, float("-inf"))
