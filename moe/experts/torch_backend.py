"""The `torch` backend: the expert FFN as one operator over torch's own matrix products, forward and backward.

Eager autograd over a loop of experts would keep gathered inputs, activations and outputs of every expert. This operator
keeps x and the two pre-activations only (D + 2·K·F elements per token, plus indices): the activation is recomputed, and the
gradient of a row's weight is <dO·W_downᵀ, a>, which needs no expert output. As one operator with a fake implementation
it also traces under torch.compile(fullgraph=True), whatever the row counts. Experts of different widths keep as much
memory as if all were of the widest: how many rows meet which is known only once they have been routed.

With `compiled` both directions are moe_cpu's kernels, which keep the same. Otherwise each expert has its own products; the
passes around them are over a block of experts (moe/experts/row_blocks.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.experts.activation import Activation, activate, gate_values, input_gradients, multiplied
from moe.experts.row_blocks import Block, Scratch, TokenSums, blocks_of, clear, multiply, sum_over_rows
from moe.routing import Dispatch
from moe_cpu import experts as cpu_experts
from moe_triton.block_sparse.topology import PackedExperts

_Matrices = list[tuple[Tensor, Tensor, Tensor]]


def expert_ffn(
    x_TD: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    dispatch: Dispatch,
    packed: PackedExperts | None = None,
    activation: Activation | None = None,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """Apply the experts and sum their weighted outputs per token: y_TD, of x_TD's type. Weights stacked or packed.

    Biases [E, F], [E, F] and [E, D], of stacked weights only. `compiled`: by moe_cpu's kernels where they have it: SwiGLU without
    biases on a CPU, in float32 or a bfloat16 that the processor multiplies, stacked weights, weighted outputs.
    """
    weights = (w_gate, w_up, w_down)
    learned = (x_TD, dispatch.weight_P, *weights, *(biases or ()))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in learned)
    on_input = dispatch.weight_on == "input"
    rows = (dispatch.token_P, dispatch.weight_P, dispatch.offsets_E1)
    if w_up.ndim == 3:
        widths = [w_up.shape[2]] * w_up.shape[0]
    else:
        assert packed is not None, "packed weights need their widths"
        widths = list(packed.widths)
    kind = activation or Activation()
    simple = kind.name == "swiglu" and biases is None and w_up.ndim == 3 and not on_input
    one_type = all(t.dtype == x_TD.dtype for t in weights)
    native = compiled and simple and x_TD.device.type == "cpu" and one_type
    return _forward(x_TD, *weights, *(biases or (None, None, None)), *rows, widths, on_input, keep, *kind, native)[0]


def _matrices(w_gate: Tensor, w_up: Tensor, w_down: Tensor, widths: Sequence[int]) -> _Matrices:
    """Views (W_gate [D, F], W_up [D, F], W_down [F, D]) of each expert's weights, stacked or packed."""
    if w_up.ndim == 3:
        return list(zip(w_gate, w_up, w_down, strict=True))
    parts = (w.split(list(widths)) for w in (w_gate, w_up, w_down))
    return [(gate.t(), up.t(), down) for gate, up, down in zip(*parts, strict=True)]


@torch.library.custom_op("moe_lab::expert_ffn", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    widths: Sequence[int],
    on_input: bool,
    keep: bool,
    activation: str,
    alpha: float,
    limit: float,
    native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if native and cpu_experts.computes(x_TD.dtype):
        return cpu_experts.forward(x_TD, w_gate, w_up, w_down, token_P, weight_P, offsets_E1, keep)
    blocks, kind = blocks_of(x_TD, offsets_E1, widths), Activation(activation, alpha, limit)
    matrices, scratch = _matrices(w_gate, w_up, w_down, widths), Scratch(x_TD, blocks)
    sums = TokenSums(x_TD, token_P, blocks, scratch)
    shape = (token_P.shape[0] if keep else 0, max(widths))
    # what no row fills, because it goes nowhere or meets a narrow expert, is zeros: no uninitialised memory is ever saved
    used = sum(block.rows * block.width for block in blocks)
    gate_PF, up_PF = (x_TD.new_empty(shape) if used == shape[0] * shape[1] else x_TD.new_zeros(shape) for _ in range(2))
    weight_P1 = weight_P.to(x_TD.dtype).unsqueeze(1)
    first = 0
    for block in blocks:
        n, token, scale = block.rows, token_P[block.start : block.end], weight_P1[block.start : block.end]
        x = scratch.gather("x", x_TD, token)[scratch.lead :]
        if on_input:
            x[:n].mul_(scale)
        if keep:
            # to the end of what is kept, because products over spare rows run into the rows that come next
            reach = (used - first) // block.width * block.width
            gate, up = (kept.view(-1)[first : first + reach].view(-1, block.width) for kept in (gate_PF, up_PF))
            first += n * block.width
        else:
            gate, up = (scratch.body(name, n, block.width) for name in ("gate", "up"))
        hidden, out = scratch.body("hidden", n, block.width), sums.rows(block)
        for span in block.spans:
            multiply(x, span, matrices[span.expert][0], gate, b_gate)
            multiply(x, span, matrices[span.expert][1], up, b_up)
        activate(kind, gate[:n], up[:n], hidden[:n], scratch.body("spare", n, block.width)[:n])
        for span in block.spans:
            multiply(hidden, span, matrices[span.expert][2], out, b_down)
        sums.add(block, None if on_input else scale)
    return sums.total(), gate_PF, up_PF


@_forward.register_fake
def _(x_TD, w_gate, w_up, w_down, b_gate, b_up, b_down, token_P, weight_P, offsets_E1, widths, on_input, keep, *_kind):
    shape = (token_P.shape[0] if keep else 0, max(widths))
    return torch.empty_like(x_TD), x_TD.new_empty(shape), x_TD.new_empty(shape)


def _hidden_gradients(
    kind: Activation,
    block: Block,
    scratch: Scratch,
    matrices: _Matrices,
    b_down: Tensor | None,
    dy: Tensor,
    kept: tuple[Tensor, Tensor],
    scale: Tensor | None,
    dweight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole buffers of a block's hidden values and of the gradients of its pre-activations, from dy, of a whole buffer too.

    With `scale`, the weights of the rows' outputs, their gradients go into `dweight`, and dy is multiplied by them.
    """
    n, lead, (gate, up) = block.rows, scratch.lead, kept
    wholes = [scratch.whole(name, n, block.width) for name in ("hidden", "dup", "dgate")]
    hidden, act, dhidden = (whole[lead : lead + n] for whole in wholes)
    for span in block.spans:
        multiply(dy[lead:], span, matrices[span.expert][2].t(), wholes[2][lead:])
    spare = scratch.body("spare", n, block.width)[:n]
    multiplied(kind, gate_values(kind, gate, act, spare), up, hidden)
    if scale is not None:
        torch.sum(torch.mul(dhidden, hidden, out=spare), 1, dtype=dweight.dtype, out=dweight)
        if b_down is not None:
            for expert, start, end, _ in block.spans:
                dweight[start:end] += (dy[lead:][start:end].to(dweight.dtype) * b_down[expert]).sum(1)
        dhidden.mul_(scale)
        dy[lead : lead + n].mul_(scale)
    input_gradients(kind, gate, up, act, dhidden, spare)
    return wholes[0], wholes[1], wholes[2]


@torch.library.custom_op("moe_lab::expert_ffn_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_PF: Tensor,
    up_PF: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    widths: Sequence[int],
    on_input: bool,
    activation: str,
    alpha: float,
    limit: float,
    native: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if native and cpu_experts.computes(x_TD.dtype):
        kept = (token_P, weight_P, offsets_E1, gate_PF, up_PF)
        dx_TD, *found, dweight_P = cpu_experts.backward(dy_TD, x_TD, w_gate, w_up, w_down, *kept)
        return dx_TD, found[0], found[1], found[2], x_TD.new_empty(0), x_TD.new_empty(0), x_TD.new_empty(0), dweight_P
    dweight_P = torch.zeros_like(weight_P)
    blocks, kind = blocks_of(x_TD, offsets_E1, widths), Activation(activation, alpha, limit)
    # an operator cannot give None
    db_gate, db_up, db_down = (x_TD.new_empty(0) if b is None else torch.zeros_like(b) for b in (b_gate, b_up, b_down))
    dw_gate, dw_up, dw_down = (torch.empty_like(w) for w in (w_gate, w_up, w_down))
    matrices, gradients = _matrices(w_gate, w_up, w_down, widths), _matrices(dw_gate, dw_up, dw_down, widths)
    for e in set(range(len(widths))) - {span.expert for block in blocks for span in block.spans}:
        for gradient in gradients[e]:
            gradient.zero_()
    scratch = Scratch(x_TD, blocks)
    sums = TokenSums(x_TD, token_P, blocks, scratch)
    lead, first = scratch.lead, 0
    weight_P1 = weight_P.to(x_TD.dtype).unsqueeze(1)
    for block in blocks:
        n, rows = block.rows, slice(block.start, block.end)
        token, scale, size = token_P[rows], weight_P1[rows], n * block.width
        gate, up = (kept.view(-1)[first : first + size].view(n, -1) for kept in (gate_PF, up_PF))
        first += size
        x, dy = scratch.gather("x", x_TD, token), scratch.gather("dy", dy_TD, token)
        hidden, dup, dgate = _hidden_gradients(
            kind, block, scratch, matrices, b_down, dy, (gate, up), None if on_input else scale, dweight_P[rows]
        )
        seen, dx = x, sums.rows(block)
        if on_input:
            seen = scratch.whole("seen", n, x_TD.shape[1])
            torch.mul(x[lead : lead + n], scale, out=seen[lead : lead + n])
        for span in block.spans:
            (matrix_gate, matrix_up, _), (dmatrix_gate, dmatrix_up, dmatrix_down) = (
                each[span.expert] for each in (matrices, gradients)
            )
            sum_over_rows(hidden, dy, span, lead, dmatrix_down)
            sum_over_rows(seen, dgate, span, lead, dmatrix_gate)
            sum_over_rows(seen, dup, span, lead, dmatrix_up)
            if b_down is not None:
                for whole, gradient in ((dgate, db_gate), (dup, db_up), (dy, db_down)):
                    torch.sum(whole[lead:][span.start : span.end], 0, out=gradient[span.expert])
            multiply(dgate[lead:], span, matrix_gate.t(), dx)
            reach = slice(span.start, span.end + span.spare)
            dx[reach].addmm_(dup[lead:][reach], matrix_up.t())
            if span is not block.spans[-1]:
                clear((hidden, dy, seen, dgate, dup), span, lead)
        if on_input:
            torch.sum(dx[:n] * x[lead : lead + n], 1, dtype=dweight_P.dtype, out=dweight_P[rows])
        sums.add(block, scale if on_input else None)
    return sums.total(), dw_gate, dw_up, dw_down, db_gate, db_up, db_down, dweight_P


@_backward.register_fake
def _(dy_TD, x_TD, gate_PF, up_PF, w_gate, w_up, w_down, b_gate, b_up, b_down, token_P, weight_P, *_rest):
    learned = (x_TD, w_gate, w_up, w_down, b_gate, b_up, b_down, weight_P)
    return tuple(x_TD.new_empty(0) if t is None else torch.empty_like(t) for t in learned)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.widths, ctx.on_input, _, activation, alpha, limit, native = inputs
    ctx.how = (activation, alpha, limit, native)
    ctx.set_materialize_grads(False)  # the kept pre-activations have no gradient: zeros of their size must not be made
    ctx.save_for_backward(*tensors, output[1], output[2])


def _autograd(ctx, dy_TD, _dgate, _dup):
    if dy_TD is None:
        return (None,) * 17
    *inputs, gate_PF, up_PF = ctx.saved_tensors
    x_TD, *others = inputs
    found = _backward(dy_TD.contiguous(), x_TD, gate_PF, up_PF, *others, ctx.widths, ctx.on_input, *ctx.how)
    *gradients, dweight = (None if t is None else g for t, g in zip((*inputs[:7], inputs[8]), found, strict=True))
    return *gradients, None, dweight, *[None] * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)
