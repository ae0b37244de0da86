"""Score, k best and gate, the heart of `topk` and `loss_free`: three steps of torch, or one kernel of moe_triton.

The kernel runs where the layer's experts run on kernels too (`Router.fused`). Both give the same experts, and weights
and gradients that agree to rounding (tests/kernels_interpreted/test_layer.py); of experts with equal scores the kernel takes
the lower, torch's topk any.
"""

from typing import NamedTuple

from torch import Tensor

from moe.routers._gates import gate
from moe.routers._scores import Score, scores
from moe.routers._select import limit_groups, top_k
from moe.routing import Selection

MOST_FUSED_EXPERTS = 4096
"""What a program of the kernel holds in registers (moe_triton.topk.MAX_EXPERTS)."""


class Choice(NamedTuple):
    """What a router makes of its logits."""

    weight_TK: Tensor
    """Gate weights of the chosen experts."""
    expert_TK: Tensor
    """The chosen experts, best first."""
    score_TE: Tensor
    """Scores of all experts."""


def choose(
    score: Score,
    logits_TE: Tensor,
    k: int,
    replay: Selection | None,
    *,
    normalize: bool,
    scaling_factor: float,
    fused: bool,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> Choice:
    """The k experts of largest score (+ bias_E, which is in no weight) within the best groups, and their gates.

    logits_TE [T, E]; bias_E [E] float32. With `replay` the experts are given. A limit on groups, a replay or more than
    MOST_FUSED_EXPERTS experts are for torch alone.
    """
    limited = num_groups != top_groups
    if fused and replay is None and not limited and logits_TE.shape[1] <= MOST_FUSED_EXPERTS:
        # imported here because triton exists on Linux only
        from moe_triton.topk import score_topk

        rule = {"score": score, "normalize": normalize, "scaling_factor": scaling_factor}
        chosen = score_topk(logits_TE, k, bias_E=bias_E, keep_scores=True, **rule)
        assert chosen.score_TE is not None
        return Choice(chosen.weight_TK, chosen.expert_TK, chosen.score_TE)
    score_TE = scores(score, logits_TE)
    key_TE = score_TE if bias_E is None else score_TE.detach() + bias_E
    expert_TK = top_k(limit_groups(key_TE, num_groups, top_groups, best=2), k, replay)
    weight_TK = gate(score_TE, expert_TK, normalize=normalize, scaling_factor=scaling_factor)
    return Choice(weight_TK, expert_TK, score_TE)
