"""Experts that cost nothing: they follow the E routed experts in the scores, from index E on, and bypass the experts."""

import torch
from torch import Tensor

from moe.routing import Tokens


def null_weights(expert_TK: Tensor, weight_TK: Tensor, first: int, count: int, tokens: Tokens) -> Tensor:
    """Gate weight of each of the `count` null experts from index `first` on [T, count]; 0 where not chosen, or padding."""
    index = torch.arange(first, first + count, device=expert_TK.device)
    is_chosen_TKZ = (expert_TK.unsqueeze(2) == index) & tokens.valid_T.view(-1, 1, 1)
    return (weight_TK.unsqueeze(2) * is_chosen_TKZ).sum(1)
