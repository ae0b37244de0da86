"""The `torch` backend: the expert FFN as one operator over torch's own matrix products, forward and backward.

Eager autograd over a loop of experts would keep gathered inputs, activations and outputs of every expert. This operator
keeps x and the two pre-activations only (D + 2·K·F elements per token, plus indices): the activation is recomputed, and the
gradient of a row's weight is <dO·W_downᵀ, a>, which needs no expert output. As one operator with a fake implementation
it also traces under torch.compile(fullgraph=True), whatever the row counts. Experts of different widths keep as much
memory as if all were of the widest: how many rows meet which is known only once they have been routed.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

from moe.routing import Dispatch
from moe_triton.block_sparse import PackedExperts


def expert_ffn(
    x_TD: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, dispatch: Dispatch, packed: PackedExperts | None = None
) -> Tensor:
    """Apply the experts and sum their weighted outputs per token: y_TD, of x_TD's type. Weights stacked or packed."""
    weights = (w_gate, w_up, w_down)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, dispatch.weight_P, *weights))
    on_input = dispatch.weight_on == "input"
    rows = (dispatch.token_P, dispatch.weight_P, dispatch.offsets_E1)
    if w_up.ndim == 3:
        widths = [w_up.shape[2]] * w_up.shape[0]
    else:
        assert packed is not None, "packed weights need their widths"
        widths = list(packed.widths)
    return _forward(x_TD, *weights, *rows, widths, on_input, keep)[0]


def _matrices(
    w_gate: Tensor, w_up: Tensor, w_down: Tensor, widths: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Views (W_gate [D, F], W_up [D, F], W_down [F, D]) of each expert's weights, stacked or packed."""
    if w_up.ndim == 3:
        return list(zip(w_gate, w_up, w_down, strict=True))
    parts = (w.split(list(widths)) for w in (w_gate, w_up, w_down))
    return [(gate.t(), up.t(), down) for gate, up, down in zip(*parts, strict=True)]


def _hidden_rows(hidden_PF: Tensor, spans: list[tuple[int, int, int]], widths: Sequence[int]) -> list[Tensor]:
    """Views [rows, width] of each span's pre-activations, one after another in a buffer with room for the widest."""
    flat, views, used = hidden_PF.view(-1), [], 0
    for e, start, end in spans:
        size = (end - start) * widths[e]
        views.append(flat[used : used + size].view(end - start, widths[e]))
        used += size
    return views


def _spans(offsets_E1: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row past the last) of every expert that has rows."""
    bounds = offsets_E1.tolist()  # host sync: each expert's product needs its size
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(bounds)) if end > start]


@torch.library.custom_op("moe_lab::expert_ffn", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    widths: Sequence[int],
    on_input: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    spans = _spans(offsets_E1)
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=sum_dtype, device=x_TD.device)
    shape = (token_P.shape[0] if keep else 0, max(widths))
    # what no row fills, because it goes nowhere or meets a narrow expert, is zeros: no uninitialised memory is ever saved
    full = sum((end - start) * widths[e] for e, start, end in spans) == shape[0] * shape[1]
    gate_PF, up_PF = (x_TD.new_empty(shape) if full else x_TD.new_zeros(shape) for _ in range(2))
    kept = [_hidden_rows(hidden, spans, widths) for hidden in (gate_PF, up_PF)] if keep else None
    matrices = _matrices(w_gate, w_up, w_down, widths)
    weight_P1 = weight_P.to(x_TD.dtype).unsqueeze(1)
    for i, (e, start, end) in enumerate(spans):
        matrix_gate, matrix_up, matrix_down = matrices[e]
        token, scale = token_P[start:end], weight_P1[start:end]
        x = x_TD.index_select(0, token)
        if on_input:
            x.mul_(scale)
        if kept is not None:
            gate, up = torch.mm(x, matrix_gate, out=kept[0][i]), torch.mm(x, matrix_up, out=kept[1][i])
        else:
            gate, up = x @ matrix_gate, x @ matrix_up
        out = silu(gate).mul_(up) @ matrix_down
        if not on_input:
            out.mul_(scale)
        y_TD.index_add_(0, token, out.to(sum_dtype))
    return y_TD.to(x_TD.dtype), gate_PF, up_PF


@_forward.register_fake
def _(x_TD, w_gate, w_up, w_down, token_P, weight_P, offsets_E1, widths, on_input, keep):
    shape = (token_P.shape[0] if keep else 0, max(widths))
    return torch.empty_like(x_TD), x_TD.new_empty(shape), x_TD.new_empty(shape)


@torch.library.custom_op("moe_lab::expert_ffn_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_PF: Tensor,
    up_PF: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    widths: Sequence[int],
    on_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spans = _spans(offsets_E1)
    sum_dtype = torch.promote_types(x_TD.dtype, torch.float32)
    dx_TD = torch.zeros(x_TD.shape, dtype=sum_dtype, device=x_TD.device)
    dweight_P = torch.zeros_like(weight_P)
    dw_gate, dw_up, dw_down = (torch.empty_like(w) for w in (w_gate, w_up, w_down))
    matrices, gradients = _matrices(w_gate, w_up, w_down, widths), _matrices(dw_gate, dw_up, dw_down, widths)
    for e in set(range(len(widths))) - {e for e, _, _ in spans}:
        for gradient in gradients[e]:
            gradient.zero_()
    hidden_rows = zip(*(_hidden_rows(hidden, spans, widths) for hidden in (gate_PF, up_PF)), strict=True)
    weight_P1 = weight_P.to(x_TD.dtype).unsqueeze(1)
    for (e, start, end), (gate, up) in zip(spans, hidden_rows, strict=True):
        matrix_gate, matrix_up, matrix_down = matrices[e]
        dmatrix_gate, dmatrix_up, dmatrix_down = gradients[e]
        token, scale = token_P[start:end], weight_P1[start:end]
        x, dy = x_TD.index_select(0, token), dy_TD.index_select(0, token)
        sigmoid = gate.sigmoid()
        act = gate * sigmoid
        hidden = act * up
        dhidden = dy @ matrix_down.t()
        if not on_input:
            dweight_P[start:end] = (dhidden * hidden).sum(1, dtype=dweight_P.dtype)
            dhidden.mul_(scale)
            hidden.mul_(scale)
        torch.mm(hidden.t(), dy, out=dmatrix_down)
        dup = dhidden * act
        # d silu(g)/dg = sigmoid + g·sigmoid·(1 - sigmoid) = sigmoid + act - act·sigmoid
        dgate = dhidden.mul_(up).mul_(sigmoid.addcmul_(act, 1 - sigmoid))
        seen = x * scale if on_input else x
        torch.mm(seen.t(), dgate, out=dmatrix_gate)
        torch.mm(seen.t(), dup, out=dmatrix_up)
        dx = (dgate @ matrix_gate.t()).addmm_(dup, matrix_up.t())
        if on_input:
            dweight_P[start:end] = (dx * x).sum(1, dtype=dweight_P.dtype)
            dx.mul_(scale)
        dx_TD.index_add_(0, token, dx.to(sum_dtype))
    return dx_TD.to(x_TD.dtype), dw_gate, dw_up, dw_down, dweight_P


@_backward.register_fake
def _(dy_TD, x_TD, gate_PF, up_PF, w_gate, w_up, w_down, token_P, weight_P, offsets_E1, widths, on_input):
    return tuple(torch.empty_like(t) for t in (x_TD, w_gate, w_up, w_down, weight_P))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.widths, ctx.on_input, _ = inputs
    ctx.set_materialize_grads(False)  # the kept pre-activations have no gradient: zeros of their size must not be made
    ctx.save_for_backward(*tensors, output[1], output[2])


def _autograd(ctx, dy_TD, _dgate, _dup):
    if dy_TD is None:
        return (None,) * 10
    *inputs, gate_PF, up_PF = ctx.saved_tensors
    x_TD, *others = inputs
    dx, *dweights, dweight = _backward(dy_TD.contiguous(), x_TD, gate_PF, up_PF, *others, ctx.widths, ctx.on_input)
    return dx, *dweights, None, dweight, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
