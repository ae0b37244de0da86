"""Balancing without a loss: what a selection bias learns from the statistics of a whole optimizer step."""

import torch
from torch import Tensor

from moe.routing import Tokens

BINS = 2048
"""Bins of a histogram; its quantiles are interpolated within a bin."""


def load_sign(counts_E: Tensor) -> Tensor:
    """+1 for an expert below the mean load, -1 above (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), float32."""
    load_E = counts_E.float()
    return (load_E.mean() - load_E).sign()


def load_lack(counts_E: Tensor) -> Tensor:
    """(mean load - load) / mean load, float32: 1 for an expert without rows, 0 at balance."""
    load_E = counts_E.float()
    return (load_E.mean() - load_E) / load_E.mean().clamp(min=1e-9)


@torch.no_grad()
def histogram(value_TE: Tensor, tokens: Tokens, low: float, high: float) -> Tensor:
    """Counts of each expert's values over the valid tokens in BINS equal bins of [low, high], int64 [E, BINS]: additive."""
    T, E = value_TE.shape
    bin_TE = ((value_TE - low) * (BINS / (high - low))).floor().clamp(0, BINS - 1).to(torch.int64)
    place_TE = bin_TE + torch.arange(E, device=value_TE.device) * BINS
    ones_TE = tokens.valid_T.unsqueeze(1).expand(T, E).to(torch.int64)
    counts = torch.zeros(E * BINS, dtype=torch.int64, device=value_TE.device)
    return counts.scatter_add_(0, place_TE.flatten(), ones_TE.flatten()).view(E, BINS)


def upper_quantile(histogram_EQ: Tensor, share: float, low: float, high: float) -> Tensor:
    """The value of each expert that `share` of its values exceed [E], float32; `low` where there are no values."""
    counts_EQ = histogram_EQ.double()
    above_EQ = counts_EQ.flip(1).cumsum(1).flip(1)
    wanted_E1 = share * above_EQ[:, :1]
    # the last bin with at least that many values at or above its lower edge; within it, linearly
    place_E1 = ((above_EQ >= wanted_E1).sum(1, keepdim=True) - 1).clamp(min=0)
    here_E1, above_E1 = counts_EQ.gather(1, place_E1), above_EQ.gather(1, place_E1)
    inside_E1 = ((above_E1 - wanted_E1) / here_E1.clamp(min=1)).clamp(0, 1)
    value_E1 = low + (place_E1 + inside_E1) * ((high - low) / BINS)
    return torch.where(above_EQ[:, :1] > 0, value_E1, low).squeeze(1).float()
