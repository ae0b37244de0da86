"""Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538): the first sparsely gated mixture.

H = W x + N(0, 1)·softplus(W_n x), the noise in training only and learned; choose the k largest of H; g = softmax over the
chosen H. Losses, squared coefficients of variation over the experts (0 at balance): of the importance Σ_t g, and of the
load Σ_t Φ((W x - bar)/softplus(W_n x)), the chance that a fresh draw of its noise would choose the expert, where the bar
is the k-th largest H among the other experts (equations 3 to 10). The paper starts with W = W_n = 0; here as every matrix.

Scoring: linear plus learned noise. Selection: k best. Gate: softmax over the chosen. Balancing: importance and load losses.
Gradient estimator: the chosen experts, and the load's through the noise.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from moe.config.schema import NonNegativeFloat, RouterConfig, config
from moe.random import normal, token_keys
from moe.routers._gates import refuse_constant_gate
from moe.routers._parts import LinearRouter, mean_over_rows, token_choice
from moe.routers._scores import linear_logits
from moe.routers._select import top_k
from moe.routing import Routing, Selection, Tokens


@config
class Config(RouterConfig):
    """Settings of noisy top-k; the weights are those of the paper's language models."""

    normalize: bool = True
    """Gate by the softmax over the chosen experts, as the paper, rather than over all of them."""
    importance_weight: NonNegativeFloat = 0.1
    """Coefficient of CV(importance)²."""
    load_weight: NonNegativeFloat = 0.1
    """Coefficient of CV(load)²."""

    source = "0.1 on CV² of importance and of load, 0 at balance; over the whole batch there, mean over batch rows here"

    def rows_per_token(self, *, num_experts: int, top_k: int) -> float:
        """K."""
        return float(top_k)

    def parameters(self, *, dim: int, num_experts: int, top_k: int) -> int:
        """One matrix for the scores and one for the size of their noise."""
        return 2 * num_experts * dim

    def check(self, *, num_experts: int, top_k: int) -> None:
        """Refuse a router whose gradient is zero."""
        refuse_constant_gate(top_k, self.normalize)

    def whole_rows(self, *, part: int) -> str:
        """The losses are not linear in a row's sums."""
        return "its losses are squares of sums over a row: use router topk with noise=gaussian"


class Router(LinearRouter):
    """Top-k of noisy scores; see the module's docstring."""

    def __init__(self, config: Config, **place: int):
        super().__init__(config, **place)
        self.noise_weight_ED = nn.Parameter(torch.empty_like(self.weight_ED))
        self.weights_sum = "one" if config.normalize else "at_most_one"

    def forward(self, x_TD: Tensor, tokens: Tokens, replay: Selection | None = None) -> Routing:
        config = self.config
        logits_TE = linear_logits(x_TD, self.weight_ED)
        deviation_TE = softplus(linear_logits(x_TD, self.noise_weight_ED))
        noisy_TE = logits_TE
        if self.training:
            key_T = token_keys(tokens, seed=self.seed, layer=self.layer, purpose="noisy top-k")
            noisy_TE = logits_TE + normal(key_T, logits_TE.shape[1]) * deviation_TE
        expert_TK = top_k(noisy_TE, self.top_k, replay)
        chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter(1, expert_TK, True)
        candidates_TE = noisy_TE.masked_fill(~chosen_TE, float("-inf")) if config.normalize else noisy_TE
        gate_TE = candidates_TE.softmax(1) * chosen_TE
        load_TE = chance_of_choice(logits_TE, noisy_TE, deviation_TE, self.top_k)
        return token_choice(
            expert_TK,
            gate_TE.gather(1, expert_TK),
            tokens,
            num_experts=noisy_TE.shape[1],
            share_TE=noisy_TE.softmax(1),
            logits_TE=noisy_TE,
            losses={
                "importance": mean_over_rows(variation_squared(gate_TE, tokens), tokens, config.importance_weight),
                "load": mean_over_rows(variation_squared(load_TE, tokens), tokens, config.load_weight),
            },
        )


def chance_of_choice(logits_TE: Tensor, noisy_TE: Tensor, deviation_TE: Tensor, k: int) -> Tensor:
    """P [T, E] that expert e is among the k best if only its own noise were drawn again (equation 9)."""
    if k == logits_TE.shape[1]:
        return torch.ones_like(logits_TE)
    best_TK = noisy_TE.topk(k + 1, dim=1).values
    inside_TE = noisy_TE >= best_TK[:, k - 1 : k]
    bar_TE = torch.where(inside_TE, best_TK[:, k:], best_TK[:, k - 1 : k])
    return torch.special.ndtr((logits_TE - bar_TE) / deviation_TE)


def variation_squared(value_TE: Tensor, tokens: Tokens) -> Tensor:
    """Squared coefficient of variation over experts of each batch row's sums over valid tokens [B]."""
    B, E = tokens.num_rows, value_TE.shape[1]
    sum_BE = (value_TE * tokens.valid_T.unsqueeze(1)).view(B, value_TE.shape[0] // max(B, 1), E).sum(1)
    mean_B1 = sum_BE.mean(1, keepdim=True).clamp(min=1e-10)
    return (sum_BE / mean_B1 - 1).square().mean(1)
