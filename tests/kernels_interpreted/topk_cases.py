"""Inputs of the fused score and top-k, and the criterion that a result must meet against moe_triton.reference in float64."""

from dataclasses import dataclass

import torch
from ffn_cases import UNIT, rms
from torch import Tensor

from moe_triton import reference, topk


@dataclass(frozen=True)
class Choice:
    """One point of the suite."""

    T: int = 33
    E: int = 7
    K: int = 2
    score: str = "softmax"
    normalize: bool = False
    biased: bool = False
    scaling_factor: float = 1.0
    logits: str = "normal"
    """normal; tied: multiples of a half, so that most tokens have experts of equal logits; large: a hundred times as large."""
    dtype: torch.dtype = torch.float32
    of: str = "both"
    """Which results have a gradient: weights, scores or both."""

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in vars(self).values())

    @property
    def rule(self) -> dict:
        """Keyword arguments of both functions."""
        return {"score": self.score, "normalize": self.normalize, "scaling_factor": self.scaling_factor}


def inputs_of(case: Choice) -> tuple[Tensor, Tensor | None]:
    """Logits [T, E] in the case's type and, if biased, a bias [E] in float32 that changes who is chosen."""
    logits_TE = torch.randn(case.T, case.E)
    if case.logits == "tied":
        logits_TE = (2 * logits_TE).round() / 2
    if case.logits == "large":
        logits_TE = 100 * logits_TE
    bias_E = torch.randn(case.E) / 4 if case.biased else None
    if bias_E is not None and case.logits == "tied":
        bias_E = bias_E * 0 + 0.125  # ties stay ties
    return logits_TE.to(case.dtype), bias_E


def results(
    function, case: Choice, logits_TE: Tensor, bias_E: Tensor | None, gradients: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Weights, experts, scores and the gradient of the logits."""
    logits_TE = logits_TE.detach().clone().requires_grad_()
    weight_TK, expert_TK, score_TE = function(logits_TE, case.K, bias_E=bias_E, **case.rule)
    both = list(zip((weight_TK, score_TE), gradients, strict=True))
    wanted = {"weights": both[:1], "scores": both[1:], "both": both}[case.of]
    loss = sum((tensor * gradient.to(tensor.dtype)).sum() for tensor, gradient in wanted)
    (dlogits_TE,) = torch.autograd.grad(loss, logits_TE)
    return {"expert": expert_TK, "weight": weight_TK.detach(), "score": score_TE.detach(), "dlogits": dlogits_TE}


def kernels(logits_TE: Tensor, k: int, **options) -> topk.TopK:
    """The operator under test."""
    return topk.score_topk(logits_TE, k, keep_scores=True, **options)


def check(case: Choice, units: float = 1) -> None:
    """The experts are the reference's, in its order; every other error is at most twice plain torch's and some rounding units."""
    logits_TE, bias_E = inputs_of(case)
    gradients = torch.randn(case.T, case.K), torch.randn(case.T, case.E)
    ours = results(kernels, case, logits_TE, bias_E, gradients)
    rough = results(reference.score_topk, case, logits_TE, bias_E, gradients)
    exact = results(reference.score_topk, case, logits_TE.double(), bias_E, gradients)
    for name, value in exact.items():
        assert ours[name].dtype == rough[name].dtype, name
        if name == "expert":
            assert ours[name].tolist() == rough[name].tolist() == value.tolist()
            continue
        # weights and scores are float32 whatever the logits are
        unit = UNIT[case.dtype if name == "dlogits" else torch.promote_types(case.dtype, torch.float32)]
        error, allowed, scale = ours[name].double() - value, rough[name].double() - value, rms(value)
        if scale == 0:
            assert not ours[name].any(), f"{name} must be exactly zero"
            continue
        # a mean over few elements scatters: one number can be right by luck in plain torch
        tolerance = 2 * rms(allowed) + unit * (units + 3 / value.numel() ** 0.5) * scale
        assert rms(error) <= tolerance, f"{name}: error {rms(error):.3g}, tolerance {tolerance:.3g}, value {scale:.3g}"
        says = (100 if value.numel() >= 100 and units == 1 else 10) * tolerance <= scale
        assert says, f"{name}: a tolerance of {tolerance:.3g} for a result of {scale:.3g} says little"
