"""The `torch` backend: the expert FFN as one operator over torch's own matrix products, forward and backward.

Eager autograd over a loop of experts would keep gathered inputs, activations and outputs of every expert. This operator
keeps x and the two pre-activations only (D + 2·K·F elements per token, plus indices): the activation is recomputed, and the
gradient of a row's weight is <dO·W_downᵀ, a>, which needs no expert output. As one operator with a fake implementation
it also traces under torch.compile(fullgraph=True), whatever the row counts.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

from moe.routing import Dispatch


def expert_ffn(x_TD: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor, dispatch: Dispatch) -> Tensor:
    """Apply the experts and sum their weighted outputs per token: y_TD, of x_TD's type."""
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, dispatch.weight_P, *weights))
    on_input = dispatch.weight_on == "input"
    rows = (dispatch.token_P, dispatch.weight_P, dispatch.offsets_E1)
    return _forward(x_TD, *weights, *rows, on_input, keep)[0]


def _spans(offsets_E1: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row past the last) of every expert that has rows."""
    bounds = offsets_E1.tolist()  # host sync: each expert's product needs its size
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(bounds)) if end > start]


@torch.library.custom_op("moe_lab::expert_ffn", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    on_input: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spans = _spans(offsets_E1)
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=sum_dtype, device=x_TD.device)
    P, F = token_P.shape[0] if keep else 0, w_gate_EDF.shape[2]
    # rows that go nowhere are written by nobody: zeros, so that no uninitialised memory is ever saved
    gate_PF = x_TD.new_zeros(P, F) if keep and _spans_end(spans) < P else x_TD.new_empty(P, F)
    up_PF = torch.zeros_like(gate_PF) if keep and _spans_end(spans) < P else torch.empty_like(gate_PF)
    weight_P1 = weight_P.to(x_TD.dtype).unsqueeze(1)
    for e, start, end in spans:
        token, scale = token_P[start:end], weight_P1[start:end]
        x = x_TD.index_select(0, token)
        if on_input:
            x.mul_(scale)
        if keep:
            gate = torch.mm(x, w_gate_EDF[e], out=gate_PF[start:end])
            up = torch.mm(x, w_up_EDF[e], out=up_PF[start:end])
        else:
            gate, up = x @ w_gate_EDF[e], x @ w_up_EDF[e]
        out = silu(gate).mul_(up) @ w_down_EFD[e]
        if not on_input:
            out.mul_(scale)
        y_TD.index_add_(0, token, out.to(sum_dtype))
    return y_TD.to(x_TD.dtype), gate_PF, up_PF


def _spans_end(spans: list[tuple[int, int, int]]) -> int:
    """The row past the last computed one."""
    return spans[-1][2] if spans else 0


@_forward.register_fake
def _(x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, token_P, weight_P, offsets_E1, on_input, keep):
    P, F = token_P.shape[0] if keep else 0, w_gate_EDF.shape[2]
    return torch.empty_like(x_TD), x_TD.new_empty(P, F), x_TD.new_empty(P, F)


@torch.library.custom_op("moe_lab::expert_ffn_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_PF: Tensor,
    up_PF: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    on_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spans = _spans(offsets_E1)
    busy = {e for e, _, _ in spans}
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    dx_TD = torch.zeros(x_TD.shape, dtype=sum_dtype, device=x_TD.device)
    dweight_P = torch.zeros_like(weight_P)
    dw_gate, dw_up, dw_down = (torch.empty_like(w) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
    for e in range(w_gate_EDF.shape[0]):
        if e not in busy:
            for grad in (dw_gate, dw_up, dw_down):
                grad[e].zero_()
    weight_P1 = weight_P.to(x_TD.dtype).unsqueeze(1)
    for e, start, end in spans:
        token, scale = token_P[start:end], weight_P1[start:end]
        gate, up = gate_PF[start:end], up_PF[start:end]
        x, dy = x_TD.index_select(0, token), dy_TD.index_select(0, token)
        sigmoid = gate.sigmoid()
        act = gate * sigmoid
        hidden = act * up
        dhidden = dy @ w_down_EFD[e].t()
        if not on_input:
            dweight_P[start:end] = (dhidden * hidden).sum(1, dtype=dweight_P.dtype)
            dhidden.mul_(scale)
            hidden.mul_(scale)
        torch.mm(hidden.t(), dy, out=dw_down[e])
        dup = dhidden * act
        # d silu(g)/dg = sigmoid + g·sigmoid·(1 - sigmoid) = sigmoid + act - act·sigmoid
        dgate = dhidden.mul_(up).mul_(sigmoid.addcmul_(act, 1 - sigmoid))
        if on_input:
            scaled = x * scale
            torch.mm(scaled.t(), dgate, out=dw_gate[e])
            torch.mm(scaled.t(), dup, out=dw_up[e])
        else:
            torch.mm(x.t(), dgate, out=dw_gate[e])
            torch.mm(x.t(), dup, out=dw_up[e])
        dx = (dgate @ w_gate_EDF[e].t()).addmm_(dup, w_up_EDF[e].t())
        if on_input:
            dweight_P[start:end] = (dx * x).sum(1, dtype=dweight_P.dtype)
            dx.mul_(scale)
        dx_TD.index_add_(0, token, dx.to(sum_dtype))
    return dx_TD.to(x_TD.dtype), dw_gate, dw_up, dw_down, dweight_P


@_backward.register_fake
def _(dy_TD, x_TD, gate_PF, up_PF, w_gate_EDF, w_up_EDF, w_down_EFD, token_P, weight_P, offsets_E1, on_input):
    return tuple(torch.empty_like(t) for t in (x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, weight_P))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.on_input, _ = inputs
    ctx.set_materialize_grads(False)  # the kept pre-activations have no gradient: zeros of their size must not be made
    ctx.save_for_backward(*tensors, output[1], output[2])


def _autograd(ctx, dy_TD, _dgate, _dup):
    if dy_TD is None:
        return (None,) * 9
    x_TD, w_gate, w_up, w_down, token_P, weight_P, offsets_E1, gate_PF, up_PF = ctx.saved_tensors
    dx, dw_gate, dw_up, dw_down, dweight = _backward(
        dy_TD.contiguous(), x_TD, gate_PF, up_PF, w_gate, w_up, w_down, token_P, weight_P, offsets_E1, ctx.on_input
    )
    return dx, dw_gate, dw_up, dw_down, None, dweight, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
