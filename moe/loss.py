"""The language-model loss from hidden states, a chunk of tokens at a time, so that no tensor of all logits ever exists.

Eager: [T, V] logits in float32, their log-probabilities kept for backward, and their gradient: three such tensors at the peak.
Here: two of [chunk, V]. The gradients of hidden states and of the head are worked out on the way, while a chunk's logits are
there, because the loss is a sum: backward only scales them. Nothing is computed twice, and T·D + V·D numbers are kept.
In float32 on a CPU products and softmax can be moe_cpu's (`compiled`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from moe.moe_layer import fits, multiply
from moe_cpu.cross_entropy import cross_entropy_
from moe_cpu.product import product_into

IGNORE = -100
"""Target of a token that carries no loss."""


def chunked_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, *, compiled: bool = False
) -> Tensor:
    """Sum of the negative log-likelihoods of targets_T [T] (IGNORE for none) under softmax(x_TD W^T), a scalar.

    Products are in x_TD's type, the rest in float32 or wider; weight_VD [V, D] is cast at use. `chunk`: tokens at a time.
    """
    grad = torch.is_grad_enabled()
    keep_x, keep_weight = grad and x_TD.requires_grad, grad and weight_VD.requires_grad
    native = compiled and fits(x_TD, weight_VD)
    return _ChunkedCrossEntropy.apply(  # type: ignore[return-value]
        x_TD, weight_VD, targets_T, chunk, keep_x, keep_weight, native
    )


@torch.no_grad()
def target_losses(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, *, compiled: bool = False) -> Tensor:
    """Negative log-likelihood of each of targets_T [T] (0 for IGNORE) under softmax(x_TD W^T), float32, without gradient."""
    w_VD, losses = weight_VD.to(x_TD.dtype), []
    for x_CD, target_C in zip(x_TD.split(chunk), targets_T.split(chunk), strict=True):
        logits_CV = multiply(x_CD, w_VD, compiled=compiled)
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        losses.append(cross_entropy(logits_CV.to(wide), target_C, ignore_index=IGNORE, reduction="none"))
    return torch.cat(losses)


_Sums = tuple[Tensor, Tensor | None, Tensor | None]
"""The sum, and the gradients of x_TD and weight_VD where they are kept."""


def _native(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, keep_x: bool, keep_weight: bool) -> _Sums:
    """The sums by moe_cpu's kernels."""
    total = x_TD.new_zeros(())
    gradient_TD = torch.empty_like(x_TD) if keep_x else None
    gradient_VD = torch.zeros_like(weight_VD) if keep_weight else None
    for begin in range(0, x_TD.shape[0], chunk):
        here = slice(begin, begin + chunk)
        share_CV = x_TD.new_empty(x_TD[here].shape[0], weight_VD.shape[0])
        product_into(x_TD[here], weight_VD.t(), share_CV, False)
        total += cross_entropy_(share_CV, targets_T[here], gradient=keep_x or keep_weight).sum()
        if gradient_TD is not None:
            product_into(share_CV, weight_VD, gradient_TD[here], False)
        if gradient_VD is not None:
            product_into(share_CV.t(), x_TD[here], gradient_VD, True)
    return total, gradient_TD, gradient_VD


def _by_torch(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk: int, keep_x: bool, keep_weight: bool) -> _Sums:
    """The sums by torch's operators. The weight's gradient is added up in float32 or wider, whatever the type of both."""
    w_VD = weight_VD.to(x_TD.dtype)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=x_TD.device)
    gradients_x = [x_TD[:0]] if keep_x else None
    gradient_VD = torch.zeros_like(weight_VD, dtype=wide) if keep_weight else None
    for x_CD, target_C in zip(x_TD.split(chunk), targets_T.split(chunk), strict=True):
        # few passes over [chunk, V], where the time goes: what has no target is masked in [chunk, D] and [chunk, 1]
        log_CV = linear(x_CD, w_VD).to(wide).log_softmax(1)
        ignored_C1 = (target_C == IGNORE).unsqueeze(1)
        target_C1 = target_C.clamp(min=0).unsqueeze(1)
        total -= log_CV.gather(1, target_C1).masked_fill(ignored_C1, 0.0).sum()
        if not (keep_x or keep_weight):
            continue
        share_CV = log_CV.exp_()
        share_CV.scatter_(1, target_C1, share_CV.gather(1, target_C1) - 1)
        change_CV = share_CV.to(x_CD.dtype)
        if gradients_x is not None:
            gradients_x.append((change_CV @ w_VD).masked_fill_(ignored_C1, 0.0))
        if gradient_VD is not None:
            counted_CD = x_CD.masked_fill(ignored_C1, 0.0)
            if gradient_VD.dtype == x_CD.dtype:
                gradient_VD.addmm_(change_CV.t(), counted_CD)
            else:
                gradient_VD += change_CV.t() @ counted_CD
    gradient_TD = torch.cat(gradients_x) if gradients_x is not None else None
    return total, gradient_TD, gradient_VD.to(weight_VD.dtype) if gradient_VD is not None else None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """d(sum)/d(logits) = softmax - one-hot, for tokens with a target; 0 for the others."""

    @staticmethod
    def forward(
        ctx,
        x_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        chunk: int,
        keep_x: bool,
        keep_weight: bool,
        native: bool,
    ) -> Tensor:
        sums = _native if native else _by_torch
        total, gradient_TD, gradient_VD = sums(x_TD, weight_VD, targets_T, chunk, keep_x, keep_weight)
        ctx.save_for_backward(gradient_TD, gradient_VD)
        return total

    @staticmethod
    def backward(ctx, *scales: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_weight = (
            gradient * scales[0].to(gradient.dtype) if gradient is not None else None for gradient in ctx.saved_tensors
        )
        return of_x, of_weight, None, None, None, None, None


@dataclass(frozen=True)
class Soft:
    """A teacher's logits for a micro-batch, and how much they count."""

    logits_BSV: Tensor
    temperature: float
    share: float
    """Of the divergence in the objective; the rest is cross-entropy."""

    def divergence(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Sum over the tokens with a target of T²·KL(teacher ‖ student) in nats, at temperature T (arXiv 1503.02531, section 2)."""
        student_BSV = (logits_BSV / self.temperature).log_softmax(-1)
        teacher_BSV = (self.logits_BSV / self.temperature).log_softmax(-1)
        far_BS = (teacher_BSV.exp() * (teacher_BSV - student_BSV)).sum(-1)
        return self.temperature**2 * far_BS.masked_fill(targets_BS == IGNORE, 0.0).sum()
