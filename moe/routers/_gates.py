"""Gates: from scores and a selection to the weights that multiply the experts."""

from torch import Tensor

from moe.errors import ConfigError


def gate(score_TE: Tensor, expert_TK: Tensor, *, normalize: bool, scaling_factor: float = 1.0) -> Tensor:
    """Weights [T, K] of the selected experts: their scores, divided by the scores' sum if `normalize`, times a constant.

    Where expert_TK is E (nobody) the weight means nothing; do not normalise then.
    """
    weight_TK = score_TE.gather(1, expert_TK.clamp(max=score_TE.shape[1] - 1))
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=1e-20)
    return weight_TK * scaling_factor


def refuse_constant_gate(
    top_k: int, normalize: bool, setting: str = "normalize=true", way_out: str = "normalize=false"
) -> None:
    """Raise ConfigError for a normalised gate of one expert, whose gradient is exactly zero."""
    if top_k == 1 and normalize:
        raise ConfigError(
            f"{setting} with top_k=1 makes every weight exactly 1, so the router gets no gradient from the loss: "
            f"use {way_out} or top_k=2"
        )
