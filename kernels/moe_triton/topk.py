"""A router's scores, its k best experts and their weights in one kernel each way: logits [T, E] to weights and experts [T, K].

Eager torch writes the scores, adds the bias into a copy, sorts, gathers, sums and divides, a launch or two for each; and the
gradient of its gather is atomic on a GPU, so not repeatable. Here a row of logits is read once, stays in registers, and is
searched k times for its largest; backward reads it again and writes the gradient once. Kept for backward: the logits and
the chosen experts.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from moe_triton.compile_case import CompileCase
from moe_triton.runtime import INTERPRETING, cdiv, launch, next_power_of_two
from moe_triton.topk_kernels import topk_bwd_kernel, topk_fwd_kernel

SCORES: tuple[str, ...] = ("softmax", "sigmoid", "sqrt_softplus")
"""Over all experts; of each logit; sqrt(log(1 + exp(logit))) of each logit."""
MAX_EXPERTS = 4096
"""A program holds whole rows of logits in registers."""


def _options(logits_TE: Tensor, k: int, score: str, normalize: bool, scaling_factor: float) -> dict[str, Any]:
    """Compile-time values and launch options of both kernels."""
    E = logits_TE.shape[1]
    block = max(next_power_of_two(E), 16)
    double = logits_TE.dtype == torch.float64
    tile = (512 if logits_TE.numel() < 8192 else 8192) if INTERPRETING else 1024  # small tests meet several programs
    return {
        "E": E,
        "K": k,
        "SCORE": score,
        "NORMALIZE": normalize,
        "SCALE": scaling_factor,
        "ACC": tl.float64 if double else tl.float32,
        "BLOCK_T": max(tile // block, 1),
        "BLOCK_E": block,
        "num_warps": 8 if block >= 2048 else 4,
    }


@torch.library.custom_op("moe_triton::topk", mutates_args=())
def _topk(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    k: int,
    score: str,
    normalize: bool,
    scaling_factor: float,
    keep_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight_TK, expert_TK, score_TE = _outputs(logits_TE, k, keep_scores)
    options = _options(logits_TE, k, score, normalize, scaling_factor)
    T, double = logits_TE.shape[0], logits_TE.dtype == torch.float64
    launch(
        topk_fwd_kernel,
        (cdiv(T, options["BLOCK_T"]),),
        logits_TE.contiguous(),
        None if bias_E is None else bias_E.contiguous(),
        weight_TK,
        expert_TK,
        score_TE,
        T,
        BIASED=bias_E is not None,
        KEEP_SCORES=keep_scores,
        INT=tl.int64 if double else tl.int32,
        BITS=64 if double else 32,
        BLOCK_K=next_power_of_two(k),
        **options,
    )
    return weight_TK, expert_TK, score_TE


def _outputs(logits_TE: Tensor, k: int, keep_scores: bool) -> tuple[Tensor, Tensor, Tensor]:
    (T, E), dtype = logits_TE.shape, torch.promote_types(logits_TE.dtype, torch.float32)
    weight_TK = logits_TE.new_empty(T, k, dtype=dtype)
    expert_TK = logits_TE.new_empty(T, k, dtype=torch.int64)
    return weight_TK, expert_TK, logits_TE.new_empty(T if keep_scores else 0, E, dtype=dtype)


@_topk.register_fake
def _(logits_TE, bias_E, k, score, normalize, scaling_factor, keep_scores):
    return _outputs(logits_TE, k, keep_scores)


@torch.library.custom_op("moe_triton::topk_backward", mutates_args=())
def _backward(
    dweight_TK: Tensor | None,
    dscore_TE: Tensor | None,
    logits_TE: Tensor,
    expert_TK: Tensor,
    score: str,
    normalize: bool,
    scaling_factor: float,
) -> Tensor:
    options = _options(logits_TE, expert_TK.shape[1], score, normalize, scaling_factor)
    T = logits_TE.shape[0]
    logits_TE = logits_TE.contiguous()
    dlogits_TE = torch.empty_like(logits_TE)
    launch(
        topk_bwd_kernel,
        (cdiv(T, options["BLOCK_T"]),),
        logits_TE,
        expert_TK,
        None if dweight_TK is None else dweight_TK.contiguous(),
        None if dscore_TE is None else dscore_TE.contiguous(),
        dlogits_TE,
        T,
        OF_WEIGHTS=dweight_TK is not None,
        OF_SCORES=dscore_TE is not None,
        **options,
    )
    return dlogits_TE


@_backward.register_fake
def _(dweight_TK, dscore_TE, logits_TE, expert_TK, score, normalize, scaling_factor):
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    logits_TE, _, _, *ctx.rule, ctx.keep_scores = inputs
    ctx.save_for_backward(logits_TE, output[1])


def _autograd(ctx, dweight_TK, _dexpert, dscore_TE):
    if not ctx.keep_scores:
        dscore_TE = None
    if dweight_TK is None and dscore_TE is None:
        return (None,) * 7
    return _backward(dweight_TK, dscore_TE, *ctx.saved_tensors, *ctx.rule), *[None] * 6


_topk.register_autograd(_autograd, setup_context=_setup_context)


class TopK(NamedTuple):
    """What a router chose for every token."""

    weight_TK: Tensor
    """Weight of each chosen expert, float32 (float64 for float64 logits), differentiable."""
    expert_TK: Tensor
    """The chosen experts, best first, int64."""
    score_TE: Tensor | None
    """Scores of all experts, as weight_TK, for losses; None unless asked for."""


def score_topk(
    logits_TE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    normalize: bool = False,
    scaling_factor: float = 1.0,
    bias_E: Tensor | None = None,
    keep_scores: bool = False,
) -> TopK:
    """Score every expert, choose each token's k best, and weigh them.

    logits_TE [T, E] of any float type, computed in float32; 1 <= k <= E <= MAX_EXPERTS, in time that grows as k·E. score:
    SCORES. The k largest logits are chosen, or the k largest of score + bias_E [E], which is in no weight and has no
    gradient; of equals the lower expert. normalize divides the weights by their sum, which for softmax makes them the softmax
    over the chosen logits ("softmax after selection"). NaN ranks above every number, and a weight of it is NaN.
    Raises ValueError for what does not fit. Specification: reference.score_topk.
    """
    E = logits_TE.shape[1]
    if not 1 <= k <= E <= MAX_EXPERTS:
        raise ValueError(f"k ({k}) of {E} experts: k must be from 1 to the number of experts, at most {MAX_EXPERTS}")
    if score not in SCORES:
        raise ValueError(f"score {score!r} is unknown: use one of {', '.join(SCORES)}")
    if bias_E is not None and bias_E.shape != (E,):
        raise ValueError(f"bias_E is {list(bias_E.shape)} but must be [{E}], one number for each expert")
    weight_TK, expert_TK, score_TE = _topk(logits_TE, bias_E, k, score, normalize, scaling_factor, keep_scores)
    return TopK(weight_TK, expert_TK, score_TE if keep_scores else None)


def compile_cases() -> list[CompileCase]:
    """Forward and backward of each score, over F experts, and over as many as a program can hold."""

    def case(name: str, score: str, E: int | None = None, k: int = 8, **options) -> CompileCase:
        return CompileCase(name, False, lambda dtype, D, F: _trial(E or F, k, score, **options))

    return [
        case("softmax", "softmax", normalize=True, dtype=torch.bfloat16),
        case("sigmoid_biased", "sigmoid", normalize=True, biased=True, scaling_factor=2.5),
        case("sqrt_softplus", "sqrt_softplus"),
        case("most_experts", "softmax", E=MAX_EXPERTS, k=32, normalize=True, biased=True),
        case("all_of_128", "sigmoid", E=128, k=128),
    ]


def _trial(
    E: int, k: int, score: str, biased: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """One forward and backward of 64 tokens on unwritten CPU tensors."""
    logits_TE, bias_E = torch.empty(64, E, dtype=dtype, requires_grad=True), torch.empty(E) if biased else None
    chosen = score_topk(logits_TE, k, score=score, bias_E=bias_E, keep_scores=True, **options)
    outputs = [tensor for tensor in (chosen.weight_TK, chosen.score_TE) if tensor is not None]
    torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
