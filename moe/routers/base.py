"""BASE layers (arXiv 2103.16716): in training, a linear assignment gives every expert the same number of tokens.

z = W x. In training, within each batch row, tokens are assigned to experts so that Σ z is largest and no expert has more than
its share, S/E rounded up; for k > 1 (the paper has k = 1), k assignments in turn, never the same expert twice. In evaluation
a token takes its k largest z. The gate is sigmoid(z). NOT CAUSAL in training: the assignment sees the whole row, and
evaluation routes otherwise. The assignment is scipy's, on the host: seconds per step for rows of thousands of tokens.

Scoring: linear. Selection: optimal assignment (evaluation: k best). Gate: sigmoid. Balancing: the assignment. Gradient
estimator: the chosen experts.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe.balance import z_loss
from moe.config.schema import NonNegativeFloat, RouterConfig, config
from moe.routers._gates import gate
from moe.routers._parts import LinearRouter, token_choice
from moe.routers._scores import linear_logits, shares
from moe.routers._select import top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of BASE routing."""

    z_weight: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss."""

    source = "no loss; the assignment is over a batch row here, over all devices' batches there"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def whole_rows(self, *, part: int) -> str:
        """An assignment is over a row."""
        return "each row's tokens are assigned together: use router loss_free"


class Router(LinearRouter):
    """Balanced assignment; see the module's docstring."""

    causal = False
    weights_sum = "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.sigmoid()
        if self.training and replay is None:
            expert_TK = assign_rows(logits_TE.detach(), tokens, self.top_k)
        else:
            expert_TK = top_k(logits_TE, self.top_k, replay)
        return token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=False),
            tokens,
            num_experts=score_TE.shape[1],
            share_TE=shares("sigmoid", score_TE),
            logits_TE=logits_TE,
            losses={"z": z_loss(logits_TE, tokens, self.config.z_weight)},
        )


def assign_rows(score_TE: Tensor, tokens: Tokens, k: int) -> Tensor:
    """Experts [T, K] of a balanced assignment of each batch row's valid tokens; E for padding."""
    T, E = score_TE.shape
    S = T // max(tokens.num_rows, 1)
    # host sync: the assignment is solved by scipy on the CPU
    score, valid = score_TE.double().cpu().numpy(), tokens.valid_T.cpu().numpy()
    expert = np.full((T, k), E, dtype=np.int64)
    for start in range(0, T, max(S, 1)):
        used = start + np.flatnonzero(valid[start : start + S])
        expert[used] = balanced_assignment(score[used], k)
    return torch.from_numpy(expert).to(score_TE.device)


def balanced_assignment(score_SE: np.ndarray, k: int) -> np.ndarray:
    """The k experts of each token [S, k]: after r of k rounds none has more than ceil(S·r/E) tokens; E for none left."""
    S, E = score_SE.shape
    cost_SE, expert_SK, load_E = -score_SE, np.full((S, k), E), np.zeros(E, dtype=int)
    taken = 1e3 * (1 + np.abs(score_SE).max(initial=0))
    for r in range(k):
        places = np.repeat(np.arange(E), -(-S * (r + 1) // E) - load_E)
        row, place = linear_sum_assignment(cost_SE[:, places])
        chosen = places[place]
        is_new = cost_SE[row, chosen] < taken / 2
        expert_SK[row, r] = np.where(is_new, chosen, E)
        load_E += np.bincount(chosen[is_new], minlength=E)
        cost_SE = cost_SE.copy()
        cost_SE[row, chosen] = taken
    return expert_SK
