"""Selection: from scores to the experts of each token. No function here has a gradient, and none waits for the device."""

import math

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.routing import Selection, Tokens


def top_k(score_TE: Tensor, k: int, replay: Selection | None) -> Tensor:
    """The k best experts of each token [T, K], best first; or the replayed ones."""
    if replay is not None:
        return replay.expert_R.view(score_TE.shape[0], k)
    return score_TE.topk(k, dim=1).indices


def above(score_TE: Tensor, threshold: Tensor | float, limit: int, replay: Selection | None) -> Tensor:
    """The `limit` best experts whose score exceeds a threshold ([T, E], [E] or scalar) [T, limit]; E where there are fewer."""
    if replay is not None:
        return replay.expert_R.view(score_TE.shape[0], limit)
    E = score_TE.shape[1]
    expert_TK = score_TE.topk(limit, dim=1).indices
    passes_TE = score_TE > threshold
    return torch.where(passes_TE.gather(1, expert_TK), expert_TK, E)


def limit_groups(score_TE: Tensor, num_groups: int, top_groups: int, *, best: int) -> Tensor:
    """Scores with -inf outside the `top_groups` best of `num_groups` equal groups of consecutive experts.

    A group's score is the sum of its `best` largest scores: 1 in DeepSeek-V2, 2 in DeepSeek-V3.
    """
    if top_groups == num_groups:
        return score_TE
    T, E = score_TE.shape
    size = E // num_groups
    group_TG = score_TE.view(T, num_groups, size).topk(min(best, size), dim=2).values.sum(2)
    keep_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(1, group_TG.topk(top_groups, dim=1).indices, True)
    return score_TE.masked_fill(~keep_TG.repeat_interleave(size, dim=1), float("-inf"))


def check_groups(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> None:
    """Raise ConfigError for groups that do not divide the experts or cannot hold a token's choices."""
    if num_experts % num_groups:
        raise ConfigError(
            f"num_groups ({num_groups}) must divide num_experts ({num_experts}): use num_groups=1 for no groups"
        )
    if top_groups > num_groups:
        raise ConfigError(f"top_groups ({top_groups}) must be at most num_groups ({num_groups}): use {num_groups}")
    if top_groups * (num_experts // num_groups) < top_k:
        raise ConfigError(
            f"{top_groups} groups of {num_experts // num_groups} experts cannot give a token top_k={top_k}: "
            f"use top_groups={-(-top_k * num_groups // num_experts)}"
        )


def check_limit(max_experts: int, num_experts: int, top_k: int) -> None:
    """Raise ConfigError for a bound on a token's experts that is below what is expected, or above all."""
    if max_experts and not top_k <= max_experts <= num_experts:
        raise ConfigError(
            f"max_experts ({max_experts}) must be from top_k ({top_k}) to num_experts ({num_experts}), or 0 for no bound: "
            f"use max_experts={min(max(max_experts, top_k), num_experts)}"
        )


def nucleus(share_TE: Tensor, mass: float, limit: int, replay: Selection | None) -> Tensor:
    """The fewest most probable experts whose shares reach `mass`, at most `limit` [T, limit]; E where there are fewer."""
    if replay is not None:
        return replay.expert_R.view(share_TE.shape[0], limit)
    best_TK, expert_TK = share_TE.topk(limit, dim=1)
    before_TK = best_TK.cumsum(1) - best_TK
    return torch.where(before_TK < mass, expert_TK, share_TE.shape[1])


@torch.no_grad()
def sinkhorn_plan(logits_TE: Tensor, tokens: Tokens, iterations: int) -> Tensor:
    """exp(logits), scaled so that in each batch row of n valid tokens these weigh 1/n and experts 1/E each [T, E].

    Columns and rows are scaled in turn, in the logarithm; rows last, so that columns are what is approximate.
    """
    T, E = logits_TE.shape
    B = tokens.num_rows
    logits_BSE = logits_TE.view(B, T // max(B, 1), E)
    valid_BS1 = tokens.valid_T.view(B, -1, 1) if B else tokens.valid_T.view(0, T, 1)
    log_count_B11 = valid_BS1.sum(1, keepdim=True).clamp(min=1).log()
    f_BS1 = torch.zeros_like(logits_BSE[:, :, :1])
    g_B1E = torch.zeros_like(logits_BSE[:, :1])
    for _ in range(iterations if T else 0):
        mass_BSE = torch.where(valid_BS1, logits_BSE + f_BS1, -1e30)
        g_B1E = -mass_BSE.logsumexp(1, keepdim=True) - math.log(E)
        f_BS1 = -(logits_BSE + g_B1E).logsumexp(2, keepdim=True) - log_count_B11
    return (logits_BSE + f_BS1 + g_B1E).exp().view(T, E)


@torch.no_grad()
def row_prices(score_TE: Tensor, tokens: Tokens, k: int, iterations: int) -> Tensor:
    """Prices of the experts that balance each batch row: k best of score - price [T, E]; see quantile_batch.py."""
    T, E = score_TE.shape
    B = tokens.num_rows
    if k == E or T == 0:
        return torch.zeros_like(score_TE)
    score_BSE, valid_BS1 = score_TE.view(B, T // B, E), tokens.valid_T.view(B, -1, 1)
    place_B1E = (valid_BS1.sum(1, keepdim=True) * k // E).expand(B, 1, E)
    price_B1E = torch.zeros_like(score_BSE[:, :1])
    for _ in range(iterations):
        bar_BS1 = (score_BSE - price_B1E).topk(k + 1, dim=2).values[:, :, -1:]
        excess_BSE = torch.where(valid_BS1, score_BSE - bar_BS1, -1e30)
        # half way between two tokens: a price of exactly one token's excess would tie its experts
        sorted_BSE = excess_BSE.sort(1, descending=True).values
        price_B1E = (sorted_BSE.gather(1, place_B1E) + sorted_BSE.gather(1, (place_B1E - 1).clamp(min=0))) / 2
    return price_B1E.expand_as(score_BSE).reshape(T, E)
