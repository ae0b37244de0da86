"""Gradient estimators: what the router learns from the experts that it did not choose, or might not have chosen."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from moe.random import token_keys, uniform
from moe.routing import Routing, Tokens, fixed_offsets

Estimator = Literal["chosen", "dense_mixer", "default_vector", "sparse_mixer"]
"""chosen: the router hears of the experts that it chose. dense_mixer: of all, computed for that alone. default_vector: of all,
the others standing in by the running mean of their outputs. sparse_mixer: of those that training sampled in the best's place."""
Straight = Literal["chosen", "dense_mixer", "default_vector"]
"""The estimators that leave the selection, and so the output, as they are."""

DECAY = 0.9
"""Decay of the running mean of an expert's outputs (arXiv 2504.12463 tries 0.9 to 0.99)."""
STRIDE = 8
"""The running means are taken over every STRIDE-th token of a batch row; moe/experts/means.py computes them."""


def hears_of_others(estimator: Estimator) -> bool:
    """Whether the router has a gradient although its gate is constant."""
    return estimator in ("dense_mixer", "default_vector")


def estimator_rows(estimator: Estimator, *, num_experts: int, top_k: int) -> float:
    """Rows per token that are computed for the estimator; a forward pass without backward is a third of one."""
    if estimator == "dense_mixer":
        return num_experts - top_k
    return top_k / (3 * STRIDE) if estimator == "default_vector" else 0.0


def with_estimator(
    routing: Routing,
    estimator: Estimator,
    score_TE: Tensor,
    expert_TK: Tensor,
    tokens: Tokens,
    *,
    default_ED: Tensor | None = None,
) -> Routing:
    """Add what dense_mixer or default_vector needs of the experts that were not chosen; no output changes.

    The output's gradient reaches the router as if y were Σ over all experts of score·expert (straight-through): each of the
    others weighs score - stopped(score), which is 0. score_TE are the gates' scores, divided by the stopped sum of the chosen
    where gates are normalised. `dense_mixer` (Yao et al. 2025, "DenseMixer") computes the others; `default_vector` (arXiv
    2504.12463) takes default_ED in their place.
    """
    if expert_TK.shape[1] == score_TE.shape[1]:
        return routing
    weight_TE = (score_TE - score_TE.detach()) * tokens.valid_T.unsqueeze(1)
    if estimator == "dense_mixer":
        return _with_every_expert(routing, weight_TE, expert_TK, tokens)
    assert default_ED is not None and routing.bypass_TD is None
    return replace(routing, bypass_TD=weight_TE.scatter(1, expert_TK, 0.0) @ default_ED.to(weight_TE.dtype))


def _with_every_expert(routing: Routing, weight_TE: Tensor, expert_TK: Tensor, tokens: Tokens) -> Routing:
    """Rows for all experts of every token, the chosen first; neither expert nor input gets a gradient from the others."""
    (T, E), K = weight_TE.shape, expert_TK.shape[1]
    chosen_TE = torch.zeros_like(weight_TE, dtype=torch.int64).scatter(1, expert_TK, 1)
    rest_TM = chosen_TE.argsort(dim=1, stable=True)[:, : E - K]
    routed_TM = torch.where(tokens.valid_T.unsqueeze(1), rest_TM, E)
    selected_TE = torch.arange(E, device=weight_TE.device).expand(T, E) < K
    return replace(
        routing,
        token_R=torch.arange(T, device=weight_TE.device).repeat_interleave(E),
        expert_R=torch.cat((routing.expert_R.view(T, K), routed_TM), 1).flatten(),
        weight_R=torch.cat((routing.weight_R.view(T, K), weight_TE.gather(1, rest_TM)), 1).flatten(),
        token_offsets=fixed_offsets(T, E, weight_TE.device),
        selected_R=selected_TE.flatten(),
    )


def sampled(
    p_TE: Tensor, tokens: Tokens, turn: int, *, seed: int, layer: int, forced_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """SparseMixer-v2 (GRIN, arXiv 2409.12136, section 2.2): an expert of each token, drawn from p, and the factor of its weight.

    The factor is 1 where the best expert was drawn, and elsewhere 1 with chance 1/4 and 1/3 otherwise: Heun's third-order
    estimate of the gradient through the choice. `scaled` applies it.
    """
    key_T = token_keys(tokens, seed=seed, layer=layer, purpose=f"sparse mixer turn {turn}")
    draw_TE = uniform(key_T, p_TE.shape[1] + 1)
    # the largest log p - log(-log u) is a sample from p (Gumbel's trick)
    noisy_TE = p_TE.detach().log() - (-draw_TE[:, 1:].log()).log()
    expert_T = noisy_TE.topk(1, dim=1).indices.squeeze(1) if forced_T is None else forced_T
    is_best_T = p_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1) == p_TE.amax(1)
    return expert_T, torch.where(is_best_T | (draw_TE[:, 0] > 0.75), 1.0, 1 / 3)


def sampled_top_k(
    share_TE: Tensor, k: int, tokens: Tokens, *, seed: int, layer: int, forced_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """k experts of each token [T, K], drawn in turn from the shares of those left, and the factors of their weights [T, K]."""
    left_TE, experts, factors = share_TE.detach(), [], []
    for turn in range(k):
        forced_T = None if forced_TK is None else forced_TK[:, turn]
        expert_T, factor_T = sampled(left_TE, tokens, turn, seed=seed, layer=layer, forced_T=forced_T)
        left_TE = left_TE.scatter(1, expert_T.unsqueeze(1), 0.0)
        experts.append(expert_T)
        factors.append(factor_T)
    return torch.stack(experts, 1), torch.stack(factors, 1)


def scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """The weight times a factor in value, with the gradient of the whole weight."""
    return weight + (weight * (factor - 1)).detach()
