"""DeepSeek-V2's router (arXiv 2405.04434, sections 2.1.2 to 2.1.4): group-limited top-k with three balance losses.

p = softmax(W x); within the M groups (devices) of largest best probability, choose the k most probable; g = p, times a
constant. Losses, each 1.0 at perfect balance: of experts, Σ_e f_e·P_e with f and P over the tokens of a sequence; of groups,
the same over the groups' sums; of communication, with f the share of tokens that reach a group, over its M/G at balance.
Without groups (the default, where devices mean nothing) this is DeepSeekMoE's gate, that of DeepSeek-V2-Lite.

Scoring: linear softmax. Selection: k best in the best groups. Gate: full probability, scaled. Balancing: expert, device and
communication losses. Gradient estimator: chosen, DenseMixer or default vectors.
"""

import torch
from torch import Tensor

from moe.config.schema import Balance, NonNegativeFloat, PositiveFloat, PositiveInt, RouterConfig, config
from moe.routers._estimators import Straight, estimator_rows, hears_of_others
from moe.routers._gates import gate, refuse_constant_gate
from moe.routers._parts import LinearRouter, choice_balance, mean_over_rows, row_needs, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import check_groups, limit_groups, top_k
from moe.routing import Loss, Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of DeepSeek-V2's router; the defaults are its losses, without groups and with scaling factor 1."""

    num_groups: PositiveInt = 1
    """G, equal groups of experts (the paper: 8 devices); 1 for no limit."""
    top_groups: PositiveInt = 1
    """M, groups that a token may use (the paper: 3)."""
    normalize: bool = False
    """Divide the chosen probabilities by their sum."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies every weight (DeepSeek-V2: 16; V2-Lite: 1)."""
    estimator: Straight = "chosen"
    """What teaches the router; moe/routers/_estimators.py. dense_mixer computes all experts (E/K of the FLOPs)."""
    balance: Balance = Balance(weight=0.003, scope="sequence")
    """Load-balancing loss over experts."""
    device_weight: NonNegativeFloat = 0.05
    """Coefficient of the balance loss over groups; without effect at one group."""
    communication_weight: NonNegativeFloat = 0.02
    """Coefficient of the balance loss over tokens received by groups; without effect at one group."""

    source = "0.003, 0.05 and 0.02 on losses that are 1.0 at balance, within each sequence: as here"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K, and what an estimator computes besides."""
        return top_k + estimator_rows(self.estimator, num_experts=num_experts, top_k=top_k)

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero, and groups that do not fit."""
        refuse_constant_gate(top_k, self.normalize and not hears_of_others(self.estimator))
        check_groups(num_experts, top_k, self.num_groups, self.top_groups)

    def whole_rows(self, *, part: int) -> str:
        """Stand-ins are over a row."""
        return row_needs(part, estimator=self.estimator)


class Router(LinearRouter):
    """Group-limited top-k; see the module's docstring."""

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        bounded = "one" if config.normalize else "at_most_one"
        self.weights_sum = bounded if config.scaling_factor == 1 else "free"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        score_TE = logits_TE.softmax(1)
        allowed_TE = limit_groups(score_TE.detach(), config.num_groups, config.top_groups, best=1)
        expert_TK = top_k(allowed_TE, self.top_k, replay)
        losses = {"balance": choice_balance(score_TE, expert_TK, tokens, config.balance, self.layer)}
        if config.num_groups > 1:
            losses |= self._group_losses(score_TE, expert_TK, tokens)
        routing = token_choice(
            expert_TK,
            gate(score_TE, expert_TK, normalize=config.normalize, scaling_factor=config.scaling_factor),
            tokens,
            num_experts=score_TE.shape[1],
            share_TE=score_TE,
            logits_TE=logits_TE,
            losses=losses,
        )
        return self.with_estimator(routing, score_TE, expert_TK, tokens, normalize=config.normalize)

    def _group_losses(self, score_TE: Tensor, expert_TK: Tensor, tokens: Tokens) -> dict[str, Loss]:
        """Balance of rows over groups (equation 20), and of tokens that reach a group (equation 25)."""
        config, G, B = self.config, self.config.num_groups, tokens.num_rows
        share_TG = score_TE.unflatten(1, (G, -1)).sum(2)
        group_TK = expert_TK // (score_TE.shape[1] // G)
        sequence = Balance(weight=config.device_weight, scope="sequence")
        valid_T1 = tokens.valid_T.unsqueeze(1)
        reached_TG = torch.zeros_like(share_TG).scatter(1, group_TK, 1.0) * valid_T1
        count_B1 = tokens.over_row(valid_T1.view(B, -1, 1).sum(1)).clamp(min=1)
        f_BG = tokens.over_row(reached_TG.view(B, -1, G).sum(1)) * (G / config.top_groups) / count_B1
        p_BG = (share_TG * valid_T1).view(B, -1, G).sum(1) / count_B1
        return {
            "device": choice_balance(share_TG, group_TK, tokens, sequence, self.layer),
            "communication": mean_over_rows((f_BG * p_BG).sum(1), tokens, config.communication_weight),
        }
