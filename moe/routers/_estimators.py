"""Gradient estimators: what the router learns from the experts that it did not choose. They change no output."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moe.routing import Routing, Tokens, fixed_offsets

Estimator = Literal["chosen", "dense_mixer"]


def with_estimator(
    routing: Routing, estimator: Estimator, score_TE: Tensor, expert_TK: Tensor, tokens: Tokens, *, normalize: bool
) -> Routing:
    """Add the rows that an estimator computes besides the chosen ones.

    `chosen`: none; the router hears of the experts that it chose. `dense_mixer` (Yao et al. 2025, "DenseMixer"): every
    expert is computed for every token, and the output's gradient reaches the router as if y were Σ over all experts of
    score·expert (straight-through). An added row weighs score - stopped(score): 0 in the output, and its expert and its
    input get no gradient from it. With normalised gates the score is divided by the stopped sum of the chosen.
    """
    T, E = score_TE.shape
    K = expert_TK.shape[1]
    if estimator == "chosen" or K == E:
        return routing
    if normalize:
        score_TE = score_TE / score_TE.gather(1, expert_TK).sum(1, keepdim=True).detach()
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.int64).scatter(1, expert_TK, 1)
    rest_TM = chosen_TE.argsort(dim=1, stable=True)[:, : E - K]
    weight_TM = score_TE.gather(1, rest_TM)
    weight_TM = (weight_TM - weight_TM.detach()) * tokens.valid_T.unsqueeze(1)
    routed_TM = torch.where(tokens.valid_T.unsqueeze(1), rest_TM, E)
    selected_TE = torch.arange(E, device=score_TE.device).expand(T, E) < K
    return replace(
        routing,
        token_R=torch.arange(T, device=score_TE.device).repeat_interleave(E),
        expert_R=torch.cat((routing.expert_R.view(T, K), routed_TM), 1).flatten(),
        weight_R=torch.cat((routing.weight_R.view(T, K), weight_TM), 1).flatten(),
        token_offsets=fixed_offsets(T, E, score_TE.device),
        selected_R=selected_TE.flatten(),
    )


def sparse_mixer(weight_T: Tensor, is_best_T: Tensor, uniform_T: Tensor) -> Tensor:
    """SparseMixer-v2's estimate for a sampled expert (GRIN, arXiv 2409.12136, section 2.2): Heun's third-order midpoint.

    In value the weight is kept where the best expert was sampled or uniform_T > 3/4, and a third of it elsewhere; its
    gradient is that of the whole weight.
    """
    factor_T = torch.where(is_best_T | (uniform_T > 0.75), 1.0, 1 / 3)
    return weight_T + (weight_T * (factor_T - 1)).detach()
