"""Scoring: from hidden states to a score of each expert, in float32 (float64 stays)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from moe.random import token_keys, uniform
from moe.routing import Tokens

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]


def linear_logits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Router logits [T, E] in float32 (float64 stays), whatever the type of x_TD."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return linear(x_TD.to(dtype), weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype))


def jittered(x_TD: Tensor, tokens: Tokens, scale: float, *, seed: int, layer: int, purpose: str) -> Tensor:
    """Hidden states times U(1-scale, 1+scale), in float32: Switch's input jitter (arXiv 2101.03961, section 2.4)."""
    key_T = token_keys(tokens, seed=seed, layer=layer, purpose=purpose)
    factor_TD = 1 + scale * (2 * uniform(key_T, x_TD.shape[1]) - 1)
    return x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)) * factor_TD


def scores(kind: Score, logits_TE: Tensor) -> Tensor:
    """Softmax over the experts, a sigmoid of each logit, or sqrt(softplus) of each."""
    if kind == "softmax":
        return logits_TE.softmax(1)
    return logits_TE.sigmoid() if kind == "sigmoid" else softplus(logits_TE).sqrt()


def shares(kind: Score, score_TE: Tensor) -> Tensor:
    """Scores that sum to 1 over the experts, for losses and statistics."""
    return score_TE if kind == "softmax" else score_TE / score_TE.sum(1, keepdim=True)
