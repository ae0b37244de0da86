"""Expert choice (arXiv 2202.09368): each expert takes the tokens of its row that score highest for it.

P = softmax(W x) over experts; in each batch row of S tokens expert e takes its C = ceil(capacity_factor·K·S/E) best tokens
by P[:, e]; the gate is P. The load is balanced by construction. NOT CAUSAL: whether a token is taken depends on
later tokens of its row, so a language model sees a little of the future in training, and generation routes otherwise.

Scoring: linear softmax. Selection: each expert's best tokens. Gate: full probability. Balancing: by construction. Gradient
estimator: the chosen experts.
"""

import torch
from torch import Tensor, nn

from moe.balance import capacity_of, score_statistics, z_loss
from moe.config.schema import NonNegativeFloat, PositiveFloat, RouterConfig, config
from moe.routers._scores import linear_logits
from moe.routing import Router as BaseRouter
from moe.routing import Routing, Selection, Tokens, count_rows


@config
class Config(RouterConfig):
    """Settings of expert choice; capacity_factor 1 gives a token K experts on average."""

    capacity_factor: PositiveFloat = 1.0
    """Tokens an expert takes from a row, over K·S/E."""
    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "no loss; the paper's capacity factor c is K·capacity_factor here (its c=2 is K=2, capacity_factor=1)"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K·capacity_factor, at most E."""
        return min(top_k * self.capacity_factor, float(num_experts))

    def whole_rows(self, *, part: int) -> str:
        """Experts choose among the tokens of a row."""
        return "experts choose among the tokens of a row: use router expert_threshold"


class Router(BaseRouter):
    """Experts choose tokens within a row; see the module's docstring."""

    causal = False
    weights_sum = "at_most_one"

    def __init__(self, config: Config, *, dim: int, num_experts: int, top_k: int, layer: int, seed: int):
        super().__init__()
        self.config, self.top_k = config, top_k
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        T, E = x_TD.shape[0], self.weight_ED.shape[0]
        logits_TE = linear_logits(x_TD, self.weight_ED)
        share_TE = logits_TE.softmax(1)
        chosen = replay if replay is not None else self._choose(share_TE, tokens)
        routed_R = torch.where(tokens.valid_T.index_select(0, chosen.token_R), chosen.expert_R, E)
        weight_R = share_TE.flatten().index_select(0, chosen.token_R * E + routed_R.clamp(max=E - 1))
        counts_E = count_rows(routed_R, E)
        return Routing(
            token_R=chosen.token_R,
            expert_R=routed_R,
            weight_R=torch.where(routed_R < E, weight_R, 0.0),
            token_offsets=nn.functional.pad(count_rows(chosen.token_R, T).cumsum(0), (1, 0)),
            num_experts=E,
            selection=chosen,
            losses={"z": z_loss(logits_TE, tokens, self.config.z_weight)},
            statistics={"counts_E": counts_E, "kept_E": counts_E, **score_statistics(share_TE, logits_TE, tokens)},
        )

    def _choose(self, share_TE: Tensor, tokens: Tokens) -> Selection:
        """Each expert's C best valid tokens of each row, in (token, expert) order."""
        T, E = share_TE.shape
        B = tokens.num_rows
        S = T // max(B, 1)
        C = min(capacity_of(self.config.capacity_factor, S, self.top_k, E), S)
        score_BSE = torch.where(tokens.valid_T.unsqueeze(1), share_TE.detach(), -1.0).view(B, S, E)
        token_BCE = score_BSE.topk(C, dim=1).indices + torch.arange(0, T, max(S, 1), device=share_TE.device).view(
            B, 1, 1
        )
        key_R = (token_BCE * E + torch.arange(E, device=share_TE.device)).flatten().sort().values
        return Selection(key_R // E, key_R % E)
