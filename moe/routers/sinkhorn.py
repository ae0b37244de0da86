"""S-BASE (Clark et al. 2022, arXiv 2202.01169): experts by an entropic optimal transport plan of the row's tokens.

z = W x. In training the plan Π is exp(z) scaled in turn until the tokens of a batch row weigh 1/S each and the experts 1/E
each (Sinkhorn 1967); a token takes its k largest entries of Π. In evaluation it takes its k largest z. The gate is
softmax(z) over all experts, or sigmoid(z). NOT CAUSAL in training: the plan sees the whole row, so a language model sees a
little of the future, and evaluation routes otherwise. Not needing a balance loss, it has none.

Scoring: linear. Selection: k best of the plan (evaluation: of the score). Gate: softmax or sigmoid. Balancing: the plan's
marginals. Gradient estimator: the chosen experts.
"""

from typing import Literal

from torch import Tensor

from moe.balance import z_loss
from moe.config.schema import NonNegativeFloat, PositiveInt, RouterConfig, config
from moe.routers._gates import gate
from moe.routers._parts import LinearRouter, token_choice
from moe.routers._scores import linear_logits, scores, shares
from moe.routers._select import sinkhorn_plan, top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of Sinkhorn routing."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """What the gate is: Megatron-LM takes sigmoid for one expert per token and softmax for more."""
    iterations: PositiveInt = 20
    """Times that rows and columns are scaled; a fixed number, so that nothing waits for the device."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "no loss; the plan is over a batch row here, over a device's batch there"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def whole_rows(self, *, part: int) -> str:
        """A transport plan is over a row."""
        return "each row has a transport plan: use router loss_free"


class Router(LinearRouter):
    """Top-k of a transport plan; see the module's docstring."""

    causal = False

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.weights_sum = "at_most_one" if config.score == "softmax" else "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = scores(config.score, logits_TE)
        plan_TE = sinkhorn_plan(logits_TE.detach(), tokens, config.iterations) if self.training else score_TE
        expert_TK = top_k(plan_TE, self.top_k, replay)
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=False),
            tokens,
            num_experts=score_TE.shape[1],
            share_TE=shares(config.score, score_TE),
            logits_TE=logits_TE,
            losses={"z": z_loss(logits_TE, tokens, config.z_weight)},
        )
