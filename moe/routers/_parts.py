"""What routers are composed of: scores, selection, gate, and the assembly of a token-choice `Routing`."""

from typing import Literal

import torch
from torch import Tensor

from moe.balance import capacity_of, score_statistics
from moe.routing import Loss, Routing, Selection, Tokens, apply_capacity, count_rows, fixed_offsets


def linear_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Router logits [T, E] in float32 (float64 stays), whatever the type of x_TD."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return torch.nn.functional.linear(x_TD.to(dtype), weight_ED.to(dtype))


def top_k(score_TE: Tensor, k: int, replay: Selection | None) -> Tensor:
    """The k best experts of each token [T, K], best first; or the replayed ones."""
    if replay is not None:
        return replay.expert_R.view(score_TE.shape[0], k)
    return score_TE.topk(k, dim=1).indices


def gate(score_TE: Tensor, expert_TK: Tensor, *, normalize: bool, scaling_factor: float = 1.0) -> Tensor:
    """Weights [T, K] of the selected experts: their scores, divided by the scores' sum if `normalize`, times a constant."""
    weight_TK = score_TE.gather(1, expert_TK)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=1e-20)
    return weight_TK * scaling_factor


def token_choice(
    expert_TK: Tensor,
    weight_TK: Tensor,
    tokens: Tokens,
    *,
    num_experts: int,
    capacity_factor: float = 0.0,
    share_TE: Tensor,
    logits_TE: Tensor,
    losses: dict[str, Loss],
    weight_on: Literal["output", "input"] = "output",
) -> Routing:
    """Assemble the routing of a router that gives every token K experts.

    Args: expert_TK [T, K] the choice; weight_TK [T, K]; capacity_factor 0 for dropless; share_TE [T, E] scores that sum to
    1 per token and logits_TE [T, E], for the statistics. Padding and dropped rows go nowhere.
    """
    T, K = expert_TK.shape
    routed_TK = torch.where(tokens.valid_T.unsqueeze(1), expert_TK, num_experts)
    kept_TK = routed_TK
    if capacity_factor > 0:
        capacity = capacity_of(capacity_factor, T // max(tokens.num_rows, 1), K, num_experts)
        kept_TK = apply_capacity(routed_TK, tokens, num_experts, capacity)
    token_R = torch.arange(T, device=expert_TK.device).repeat_interleave(K)
    return Routing(
        token_R=token_R,
        expert_R=kept_TK.flatten(),
        weight_R=torch.where(kept_TK < num_experts, weight_TK, 0.0).flatten(),
        token_offsets=fixed_offsets(T, K, expert_TK.device),
        num_experts=num_experts,
        selection=Selection(token_R, expert_TK.flatten()),
        weight_on=weight_on,
        losses=losses,
        statistics={
            "counts_E": count_rows(routed_TK.flatten(), num_experts),
            "kept_E": count_rows(kept_TK.flatten(), num_experts),
            **score_statistics(share_TE, logits_TE, tokens),
        },
    )
