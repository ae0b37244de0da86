"""The expert FFN with 8-bit products: forward and the rows' gradients in e4m3, the weights' gradients in x's own type.

Weights stay as they are; each direction quantises them again, so nothing but x and the pre-activations is kept, as in
moe_triton.ffn. Forward: x, weights quantised; product with W_gate and W_up (x gathered, 1 byte an element); activation fused
with quantising; product with W_down; weighted sum. Backward: dO quantised per token (a row's weight scales its gradient, and
a scale absorbs it); product with W_downᵀ; activation's gradient fused with quantising; the two products over rows of
moe_triton.weight_backward; one product with W_gateᵀ and W_upᵀ; sum per token; ds in the routing's order.
"""

import torch
from torch import Tensor

from moe_triton.activation import GATED_ACTIVATIONS
from moe_triton.combine import combine
from moe_triton.compile_case import CompileCase
from moe_triton.hidden_backward import row_weight_bwd
from moe_triton.low_precision.activation import activate_bwd_quantize, activate_quantize
from moe_triton.low_precision.formats import FORMATS, ScaleFormat, format_of, fp8_dtype
from moe_triton.low_precision.product import LEAST_HEIGHT, fp8_rows
from moe_triton.low_precision.quantize import quantize_rows, quantize_weights
from moe_triton.plan import RoutingPlan, routing_plan, schedule_tiles
from moe_triton.runtime import INTERPRETING, target
from moe_triton.tiles import Weights
from moe_triton.weight_backward import w_down_bwd, w_up_bwd


def _pre_activations(
    x_TD: Tensor, w_gate_EDF: Tensor | None, w_up_EDF: Tensor, plan: RoutingPlan, form: ScaleFormat
) -> Tensor:
    """[P, 2F]: x·W_gate beside x·W_up of every row; [P, F] without a gate."""
    dtype = fp8_dtype(target())
    weights = [weight.mT for weight in (w_gate_EDF, w_up_EDF) if weight is not None]
    x, w = quantize_rows(x_TD, form, dtype), quantize_weights(weights, form, dtype)
    return fp8_rows(x, w, plan, form, x_TD, gather=True)


@torch.library.custom_op("moe_triton::fp8_ffn", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_gate_EDF: Tensor | None,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    weight_R: Tensor,
    token_P: Tensor,
    row_P: Tensor,
    reverse_R: Tensor,
    offsets_E1: Tensor,
    token_offsets: Tensor,
    schedule: Tensor,
    tile_rows: int,
    activation: str,
    precision: str,
    keep: bool,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    form, dtype = format_of(precision), fp8_dtype(target())
    plan = RoutingPlan(token_P, row_P, reverse_R, offsets_E1, token_offsets, schedule, tile_rows)
    h = _pre_activations(x_TD, w_gate_EDF, w_up_EDF, plan, form)
    hidden = activate_quantize(h, plan, form, dtype, activation=activation)
    w_down = quantize_weights([w_down_EFD.mT], form, dtype)
    out_PD = fp8_rows(hidden, w_down, plan, form, x_TD, gather=False)
    return combine(out_PD, weight_R, plan), h if keep else h.new_empty(0, h.shape[1])


@_forward.register_fake
def _(x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, weight_R, token_P, *rest):
    keep, columns = rest[-2], w_up_EDF.shape[2] * (1 if w_gate_EDF is None else 2)
    return torch.empty_like(x_TD), x_TD.new_empty(token_P.shape[0] if keep else 0, columns)


@torch.library.custom_op("moe_triton::fp8_ffn_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_gate_EDF: Tensor | None,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    weight_R: Tensor,
    token_P: Tensor,
    row_P: Tensor,
    reverse_R: Tensor,
    offsets_E1: Tensor,
    token_offsets: Tensor,
    schedule: Tensor,
    h: Tensor,
    tile_rows: int,
    activation: str,
    precision: str,
    kept: bool,
    gradient_dtype: torch.dtype,
    wanted: list[bool],
) -> list[Tensor]:
    form, dtype = format_of(precision), fp8_dtype(target())
    plan = RoutingPlan(token_P, row_P, reverse_R, offsets_E1, token_offsets, schedule, tile_rows)
    if not kept:
        h = _pre_activations(x_TD, w_gate_EDF, w_up_EDF, plan, form)
    dy, w_down = quantize_rows(dy_TD, form, dtype), quantize_weights([w_down_EFD], form, dtype)
    dhidden_PF = fp8_rows(dy, w_down, plan, form, x_TD, gather=True)
    dh, dgate_PF, dup_PF, weighted_PF, dweight = activate_bwd_quantize(
        h, dhidden_PF, weight_R, plan, form, dtype, activation=activation
    )
    want_x, want_gate, want_up, want_down, want_weight = wanted
    found = _empty_gradients(x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, weight_R, gradient_dtype, wanted)
    if want_down:
        w_down_bwd(weighted_PF, dy_TD, weight_R, plan, {"w_down_EFD": found[3]}, weigh_input=False)
    if want_gate or want_up:
        gradients = {"w_up_EDF": found[2]} | ({} if w_gate_EDF is None else {"w_gate_EDF": found[1]})
        w_up_bwd(x_TD, dgate_PF, dup_PF, weight_R, plan, gradients, weigh_input=False)
    if want_x:
        weights = [weight for weight in (w_gate_EDF, w_up_EDF) if weight is not None]
        w_up = quantize_weights(weights, form, dtype, joined=True)
        found[0] = combine(fp8_rows(dh, w_up, plan, form, x_TD, gather=False), None, plan)
    if want_weight:
        found[4] = row_weight_bwd(dweight, weight_R, plan)
    return found


def _empty_gradients(x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, weight_R, gradient_dtype, wanted) -> list[Tensor]:
    """Unwritten gradients, empty for what nobody wants; W_gate and W_up are written by one kernel, so both or none."""
    want_x, want_gate, want_up, want_down, want_weight = wanted
    want_up = want_up or want_gate
    tensors = (
        (x_TD, want_x, x_TD.dtype),
        (w_gate_EDF, want_up and w_gate_EDF is not None, gradient_dtype),
        (w_up_EDF, want_up, gradient_dtype),
        (w_down_EFD, want_down, gradient_dtype),
        (weight_R, want_weight, weight_R.dtype),
    )
    return [torch.empty_like(t, dtype=dtype) if want else x_TD.new_empty(0) for t, want, dtype in tensors]


@_backward.register_fake
def _(dy_TD, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, weight_R, *rest):
    return _empty_gradients(x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, weight_R, *rest[-2:])


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the kept pre-activations have no gradient
    *tensors, ctx.tile_rows, ctx.activation, ctx.precision, ctx.kept, ctx.gradient_dtype = inputs
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, dy_TD, _):
    if dy_TD is None:
        return (None,) * 16
    wanted = list(ctx.needs_input_grad[:5])
    settings = (ctx.tile_rows, ctx.activation, ctx.precision, ctx.kept, ctx.gradient_dtype)
    gradients = _backward(dy_TD.contiguous(), *ctx.saved_tensors, *settings, wanted)
    return (*(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 11)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def fp8_ffn(
    x_TD: Tensor,
    weights: Weights,
    weight_R: Tensor,
    plan: RoutingPlan,
    *,
    precision: str,
    activation: str = "swiglu",
    keep: bool = True,
    gradient_dtype: torch.dtype | None = None,
) -> Tensor:
    """`moe_triton.ffn.planned_ffn` with 8-bit products; precision names a format of moe_triton.low_precision.formats.

    Without biases. keep=False computes the pre-activations again in backward. Raises ValueError where the machine has no e4m3
    matrix instructions, naming it.
    """
    if weights[3:] != (None, None, None):
        raise ValueError(f"precision {precision!r} takes no biases: use precision='native'")
    format_of(precision)
    w_gate_EDF, w_up_EDF, w_down_EFD = (None if w is None else w.contiguous() for w in weights[:3])
    assert w_up_EDF is not None and w_down_EFD is not None
    if plan.tile_rows < LEAST_HEIGHT and not INTERPRETING:
        tiles = schedule_tiles(plan.offsets_E1, plan.token_P.shape[0], LEAST_HEIGHT)
        plan = plan._replace(schedule=tiles, tile_rows=LEAST_HEIGHT)
    return _forward(
        x_TD.contiguous(),
        w_gate_EDF,
        w_up_EDF,
        w_down_EFD,
        weight_R.contiguous(),
        *plan,
        activation,
        precision,
        keep,
        gradient_dtype or x_TD.dtype,
    )[0]


def compile_cases() -> list[CompileCase]:
    """Forward and backward in both formats, with and without a gate; refused on sm_80, which has no 8-bit instructions."""
    targets = ("sm_90", "sm_100", "gfx942")

    def case(name: str, precision: str, activation: str, rows: int = 2048) -> CompileCase:
        return CompileCase(
            name, True, lambda dtype, D, F: _trial(dtype, D, F, precision, activation, rows), targets=targets
        )

    few = [case(f"{precision}_few_rows", precision, "swiglu", rows=128) for precision in FORMATS]
    return [*(case(name, name, "swiglu") for name in FORMATS), case("fp8_row_without_gate", "fp8_row", "relu2"), *few]


def _trial(dtype: torch.dtype, D: int, F: int, precision: str, activation: str, rows: int) -> None:
    """One forward and backward of 8 experts on CPU tensors."""
    E, K = 8, 2

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    T = rows // K
    plan = routing_plan(
        torch.arange(T).repeat_interleave(K),
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(T + 1) * K,
        num_experts=E,
    )
    gate = tensor(E, D, F) if activation in GATED_ACTIVATIONS else None
    weights = Weights(gate, tensor(E, D, F), tensor(E, F, D))
    weight_R = torch.zeros(rows, requires_grad=True)
    y_TD = fp8_ffn(tensor(T, D), weights, weight_R, plan, precision=precision, activation=activation)
    y_TD.backward(torch.zeros_like(y_TD))
