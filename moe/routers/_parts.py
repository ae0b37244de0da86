"""What routers share besides their five choices: a linear router, the usual losses, the assembly of a `Routing`."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe.balance import balance_loss, capacity_of, score_statistics, z_loss
from moe.config.schema import Balance
from moe.routers._estimators import DECAY, STRIDE, hears_of_others, with_estimator
from moe.routing import (
    Counts,
    Loss,
    Router,
    Routing,
    Selection,
    Tokens,
    apply_capacity,
    count_rows,
    fixed_offsets,
)


class LinearRouter(Router):
    """A router with one vector per expert, weight_ED, that knows its settings and its place.

    With the estimator `default_vector` it also has default_ED, the running mean of each expert's outputs; a router with an
    `update` of its own calls this one's too.
    """

    default_ED: Tensor | None

    def __init__(self, config: Any, *, dim: int, num_experts: int, top_k: int, layer: int, seed: int):
        super().__init__()
        self.config, self.top_k, self.layer, self.seed = config, top_k, layer, seed
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim))
        stands_in = getattr(config, "estimator", "chosen") == "default_vector"
        self.output_stride = STRIDE if stands_in else 0
        self.register_buffer("default_ED", torch.zeros(num_experts, dim) if stands_in else None)

    def with_estimator(
        self, routing: Routing, score_TE: Tensor, expert_TK: Tensor, tokens: Tokens, *, normalize: bool
    ) -> Routing:
        """What the config's estimator adds to a routing whose weights are these scores, times the scaling factor if any."""
        if not hears_of_others(self.config.estimator):
            return routing
        score_TE = score_TE / score_TE.gather(1, expert_TK).sum(1, keepdim=True).detach() if normalize else score_TE
        score_TE = score_TE * getattr(self.config, "scaling_factor", 1.0)
        return with_estimator(routing, self.config.estimator, score_TE, expert_TK, tokens, default_ED=self.default_ED)

    @torch.no_grad()
    def update(self, statistics: Counts) -> None:
        if self.default_ED is not None and "output_sum_ED" in statistics:
            rows_E1 = statistics["output_rows_E"].unsqueeze(1)
            change_ED = statistics["output_sum_ED"] / rows_E1.clamp(min=1) - self.default_ED
            self.default_ED += (1 - DECAY) * torch.where(rows_E1 > 0, change_ED, 0.0).to(self.default_ED.dtype)


def kept_rows(top_k: int, capacity_factor: float) -> float:
    """Rows per token of K choices: K, or less where capacity cannot hold the balanced load."""
    return top_k * min(1.0, capacity_factor) if capacity_factor else float(top_k)


def row_needs(
    part: int, *, capacity_factor: float = 0.0, eval_capacity_factor: float = 0.0, estimator: str = "chosen"
) -> str:
    """Why a router with these settings cannot route rows in parts of `part` tokens; empty if it can."""
    for field, factor in {"capacity_factor": capacity_factor, "eval_capacity_factor": eval_capacity_factor}.items():
        if factor:
            return f"{field} ({factor}) counts the tokens of a row: use {field}=0"
    if estimator == "default_vector" and part % STRIDE:
        return (
            f"estimator default_vector takes every {STRIDE}th token, which needs parts of a multiple of {STRIDE} tokens"
        )
    return ""


def choice_balance(share_TE: Tensor, expert_TK: Tensor, tokens: Tokens, balance: Balance, layer: int) -> Loss:
    """The load-balancing loss of token choice; experts from E on are nobody."""
    T, K = expert_TK.shape
    token_R = torch.arange(T, device=expert_TK.device).repeat_interleave(K)
    return balance_loss(share_TE, expert_TK.flatten(), token_R, tokens, balance, layer)


def balance_and_z(
    share_TE: Tensor,
    logits_TE: Tensor,
    expert_TK: Tensor,
    tokens: Tokens,
    balance: Balance,
    z_weight: float,
    layer: int,
) -> dict[str, Loss]:
    """The load-balancing loss of token choice, and the router z-loss."""
    return {
        "balance": choice_balance(share_TE, expert_TK, tokens, balance, layer),
        "z": z_loss(logits_TE, tokens, z_weight),
    }


def mean_over_tokens(value_T: Tensor, tokens: Tokens, weight: float) -> Loss:
    """A per-token quantity as a loss: this micro-batch's part of its mean over the step's valid tokens."""
    if weight == 0:
        value_T = value_T.detach()
    return Loss((value_T * tokens.valid_T).sum() / tokens.step_tokens.clamp(min=1), weight)


def mean_over_rows(value_B: Tensor, tokens: Tokens, weight: float) -> Loss:
    """A per-row quantity as a loss: this micro-batch's part of its mean over the step's rows with valid tokens."""
    if weight == 0:
        value_B = value_B.detach()
    used_B = tokens.valid_T.view(tokens.num_rows, -1).any(1) if tokens.num_rows else value_B.bool()
    return Loss(torch.where(used_B, value_B, 0.0).sum() / tokens.step_rows.clamp(min=1), weight)


def token_choice(
    expert_TK: Tensor,
    weight_TK: Tensor,
    tokens: Tokens,
    *,
    num_experts: int,
    keep_TK: Tensor | None = None,
    capacity_factor: float = 0.0,
    share_TE: Tensor,
    logits_TE: Tensor,
    losses: dict[str, Loss],
    weight_on: Literal["output", "input"] = "output",
    statistics: Counts | None = None,
    bypass_TD: Tensor | None = None,
) -> Routing:
    """Assemble the routing of a router that gives every token up to K experts.

    Args: expert_TK [T, K] the choice, E or more for nobody; weight_TK [T, K]; keep_TK False for choices that the router
    gives up again; capacity_factor 0 for dropless; share_TE [T, E] scores that sum to 1 per token and logits_TE [T, E],
    for the statistics; `statistics` are further ones, for the router's `update`. Padding and dropped rows go nowhere.
    """
    T, K = expert_TK.shape
    stays_TK = tokens.valid_T.unsqueeze(1) if keep_TK is None else tokens.valid_T.unsqueeze(1) & keep_TK
    routed_TK = torch.where(stays_TK, expert_TK, num_experts).clamp(max=num_experts)
    kept_TK = routed_TK
    if capacity_factor > 0 and not tokens.unfinished:
        capacity = capacity_of(capacity_factor, T // max(tokens.num_rows, 1), K, num_experts)
        kept_TK = apply_capacity(routed_TK, tokens, num_experts, capacity)
    token_R = torch.arange(T, device=expert_TK.device).repeat_interleave(K)
    return Routing(
        token_R=token_R,
        expert_R=kept_TK.flatten(),
        weight_R=torch.where(kept_TK.flatten() < num_experts, weight_TK.flatten(), 0.0),
        token_offsets=fixed_offsets(T, K, expert_TK.device),
        num_experts=num_experts,
        selection=Selection(token_R, expert_TK.flatten()),
        weight_on=weight_on,
        losses=losses,
        statistics={
            "counts_E": count_rows(routed_TK.flatten(), num_experts),
            "kept_E": count_rows(kept_TK.flatten(), num_experts),
            **score_statistics(share_TE, logits_TE, tokens),
            **(statistics or {}),
        },
        bypass_TD=bypass_TD,
    )
