"""Losses and statistics that routers share. Each loss is an additive part of the whole step's value.

A sum over micro-batches and ranks of these parts is the step's value, and the sum of their gradients is its gradient,
because every denominator is a count over the whole step, known before the first forward pass.
"""

import math

import torch
from torch import Tensor

from moe.config.schema import Balance
from moe.routing import Counts, Loss, Tokens, count_rows


def balance_loss(
    share_TE: Tensor, expert_R: Tensor, token_R: Tensor, tokens: Tokens, balance: Balance, layer: int
) -> Loss:
    """Load-balancing loss E·Σ_e f_e·P_e: 1.0 at perfect balance for every K and E (Switch, arXiv 2101.03961 eq. 4).

    Args: share_TE [T, E] float32, rows summing to 1; expert_R [R] selected experts before capacity (E: nobody); token_R [R].
    `sequence`: f and P within each batch row, averaged over rows. `global`: f over the whole step (arXiv 2501.11873), P
    averaged over the step's tokens. `micro_batch`: f over this micro-batch. With weight 0 nothing is differentiated or
    counted in advance, and the value of `global` is that of `micro_batch`.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and balance.weight > 0):
        value = _balance_value(share_TE, expert_R, token_R, tokens, balance.scope, layer)
    return Loss(value, balance.weight)


def _balance_value(
    share_TE: Tensor, expert_R: Tensor, token_R: Tensor, tokens: Tokens, scope: str, layer: int
) -> Tensor:
    E = share_TE.shape[1]
    B = tokens.num_rows
    valid_TE = tokens.valid_T.unsqueeze(1).to(share_TE.dtype)
    routed_R = torch.where(tokens.valid_T.index_select(0, token_R), expert_R, E)
    if scope == "sequence":
        S = share_TE.shape[0] // max(B, 1)
        row_R = token_R // max(S, 1)
        counts_BE = count_rows(row_R * (E + 1) + routed_R, B * (E + 1)).view(B, E + 1)[:, :E].to(share_TE.dtype)
        # the last column: valid tokens of the row
        counts_BE = tokens.over_row(torch.cat((counts_BE, valid_TE.view(B, S).sum(1, keepdim=True)), 1))
        counts_BE, valid_B1 = counts_BE.split((E, 1), 1)
        f_BE = counts_BE / counts_BE.sum(1, keepdim=True).clamp(min=1)
        p_BE = (share_TE * valid_TE).view(B, S, E).sum(1) / valid_B1.clamp(min=1)
        return E * (f_BE * p_BE).sum() / tokens.step_rows.clamp(min=1)
    if scope == "micro_batch" or (tokens.step_counts_LE is None and tokens.sum_over_ranks is None):
        counts_E = count_rows(routed_R, E)
    elif tokens.step_counts_LE is not None:
        counts_E = tokens.step_counts_LE[layer, :E]
    else:
        assert tokens.sum_over_ranks is not None
        counts_E = tokens.sum_over_ranks(count_rows(routed_R, E))
    f_E = counts_E.to(share_TE.dtype) / counts_E.sum().clamp(min=1)
    return E * (f_E * (share_TE * valid_TE).sum(0)).sum() / tokens.step_tokens.clamp(min=1)


def z_loss(logits_TE: Tensor, tokens: Tokens, weight: float) -> Loss:
    """Router z-loss: mean over the step's tokens of logsumexp(logits)² (ST-MoE, arXiv 2202.08906 eq. 5)."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
        squares_T = logits_TE.logsumexp(1).square() * tokens.valid_T
        return Loss(squares_T.sum() / tokens.step_tokens.clamp(min=1), weight)


def _margin(share_TE: Tensor) -> Tensor:
    """The best share of each token minus its second best; 1 with a single expert."""
    if share_TE.shape[1] < 2:
        return torch.ones_like(share_TE).sum(1)
    best_T1 = share_TE.amax(1, keepdim=True)
    is_best_TE = share_TE == best_T1
    second_T = share_TE.masked_fill(is_best_TE, -1.0).amax(1)
    return torch.where(is_best_TE.sum(1) > 1, 0.0, best_T1.squeeze(1) - second_T)


@torch.no_grad()
def score_statistics(share_TE: Tensor, logits_TE: Tensor, tokens: Tokens) -> Counts:
    """Sums over valid tokens: each expert's score, score entropy (nats), top-1 margin, squared logits; the largest |logit|.

    Squares: the mean over experts of logit², and logsumexp(logits)², the z-loss before its mean. Only the token count where
    the tokens are not `measured`.
    """
    valid_T = tokens.valid_T
    if not tokens.measured:
        return {"token_sum": valid_T.sum().float()}
    # written for speed: a topk and torch.special.entr take four times as long, 3 % of a step with many small experts
    entropy_T = -(share_TE * share_TE.clamp(min=1e-38).log()).sum(1)
    margin_T = _margin(share_TE)
    logit_max = (logits_TE.abs() * valid_T.unsqueeze(1)).amax() if logits_TE.numel() else logits_TE.new_zeros(())
    return {
        "entropy_sum": (entropy_T * valid_T).sum(),
        "margin_sum": (margin_T * valid_T).sum(),
        "token_sum": valid_T.sum().float(),
        "share_sum_E": (share_TE * valid_T.unsqueeze(1)).sum(0),
        "logit_square_sum": (logits_TE.square().mean(1) * valid_T).sum(),
        "lse_square_sum": (logits_TE.logsumexp(1).square() * valid_T).sum(),
        "logit_max": logit_max,
    }


def capacity_of(capacity_factor: float, tokens_per_row: int, top_k: int, num_experts: int) -> int:
    """Rows that an expert accepts from one batch row: ceil(capacity_factor · S · K / E), at least 1."""
    # the small subtraction keeps 1.1 · 100 / 10 at 11: the product is a little more in floating point
    return max(1, math.ceil(capacity_factor * tokens_per_row * top_k / num_experts - 1e-9))
