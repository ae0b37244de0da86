"""The expert FFN y_t = Σ s · (f(x_t·W_gate) · (x_t·W_up))·W_down over the rows of token t, forward and backward.

Forward is three launches (up, down, combine); backward five and a small reduction (hidden, W_down, W_gate and W_up, dX rows,
their sum; ds). Saved for backward: x, the two pre-activations, the indices and the rows' weights, so 2·D + 4·K·F bytes per
token in bfloat16 however many experts there are; with recompute="hidden" x alone, for one more launch of `up` in backward.
Gathered rows, activations and expert outputs are never kept. Nothing waits for the host, and no sum is atomic.
"""

from typing import Literal

import torch
from torch import Tensor

from moe_triton.activation import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS
from moe_triton.combine import combine
from moe_triton.compile_case import CompileCase
from moe_triton.down import down
from moe_triton.hidden_backward import hidden_bwd, row_weight_bwd
from moe_triton.input_backward import input_bwd
from moe_triton.low_precision.ffn import fp8_ffn
from moe_triton.plan import RoutingPlan, routing_plan
from moe_triton.reference import ALPHA, LIMIT
from moe_triton.tiles import Weights
from moe_triton.up import up
from moe_triton.weight_backward import w_down_bwd, w_up_bwd


@torch.library.custom_op("moe_triton::expert_ffn", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_gate_EDF: Tensor | None,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    b_gate_EF: Tensor | None,
    b_up_EF: Tensor | None,
    b_down_ED: Tensor | None,
    weight_R: Tensor,
    token_P: Tensor,
    row_P: Tensor,
    reverse_R: Tensor,
    offsets_E1: Tensor,
    token_offsets: Tensor,
    schedule: Tensor,
    tile_rows: int,
    activation: str,
    alpha: float,
    limit: float,
    weigh_input: bool,
    keep: bool,
    gradient_dtype: torch.dtype,
    main_gradients: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    weights = Weights(w_gate_EDF, w_up_EDF, w_down_EFD, b_gate_EF, b_up_EF, b_down_ED)
    plan = RoutingPlan(token_P, row_P, reverse_R, offsets_E1, token_offsets, schedule, tile_rows)
    rule = {"activation": activation, "alpha": alpha, "limit": limit, "weigh_input": weigh_input}
    gate_PF, up_PF, hidden_PF = up(x_TD, weights, weight_R, plan, keep=keep, **rule)
    out_PD = down(hidden_PF, weights, plan)
    return combine(out_PD, None if weigh_input else weight_R, plan), gate_PF, up_PF


@_forward.register_fake
def _(x_TD, w_gate_EDF, w_up_EDF, w_down, b_gate, b_up, b_down, weight_R, token_P, *rest):
    keep, P, F = rest[-3], token_P.shape[0], w_up_EDF.shape[2]
    gate_PF = x_TD.new_empty(P if keep and w_gate_EDF is not None else 0, F)
    return torch.empty_like(x_TD), gate_PF, x_TD.new_empty(P if keep else 0, F)


def _gradients(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_gate_EDF: Tensor | None,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    b_gate_EF: Tensor | None,
    b_up_EF: Tensor | None,
    b_down_ED: Tensor | None,
    weight_R: Tensor,
    token_P: Tensor,
    row_P: Tensor,
    reverse_R: Tensor,
    offsets_E1: Tensor,
    token_offsets: Tensor,
    schedule: Tensor,
    gate_PF: Tensor,
    up_PF: Tensor,
    main_gradients: list[Tensor],
    tile_rows: int,
    activation: str,
    alpha: float,
    limit: float,
    weigh_input: bool,
    kept: bool,
    gradient_dtype: torch.dtype,
    want_x: bool,
    want_up: bool,
    want_down: bool,
    want_weight: bool,
) -> list[Tensor]:
    weights = Weights(w_gate_EDF, w_up_EDF, w_down_EFD, b_gate_EF, b_up_EF, b_down_ED)
    plan = RoutingPlan(token_P, row_P, reverse_R, offsets_E1, token_offsets, schedule, tile_rows)
    rule = {"activation": activation, "alpha": alpha, "limit": limit, "weigh_input": weigh_input}
    if not kept:
        gate_PF, up_PF, _ = up(x_TD, weights, weight_R, plan, keep=True, **rule)
    dgate_PF, dup_PF, weighted_PF, parts = hidden_bwd(dy_TD, gate_PF, up_PF, weights, weight_R, plan, **rule)
    present = [name for name, weight in weights._asdict().items() if weight is not None]
    into = dict(zip(present, main_gradients, strict=True)) if main_gradients else {}
    fresh = {} if into else _gradients_like(weights, gradient_dtype, want_up, want_down)
    if want_down:
        w_down_bwd(weighted_PF, dy_TD, weight_R, plan, into or fresh, weigh_input=weigh_input, add=bool(into))
    if want_up:
        w_up_bwd(x_TD, dgate_PF, dup_PF, weight_R, plan, into or fresh, weigh_input=weigh_input, add=bool(into))
    dx_TD = dweight_R = None
    if want_x or (want_weight and weigh_input):
        dx_PD, x_parts = input_bwd(dgate_PF, dup_PF, x_TD, weights, weight_R, plan, weigh_input=weigh_input)
        parts = x_parts if weigh_input else parts
        dx_TD = combine(dx_PD, None, plan) if want_x else None
    if want_weight:
        dweight_R = row_weight_bwd(parts, weight_R, plan)
    return _in_order(x_TD, dx_TD, dweight_R, by_name=fresh)


def _gradients_like(weights: Weights, dtype: torch.dtype, want_up: bool, want_down: bool) -> dict[str, Tensor]:
    """Unwritten gradients, by name, of the weights that one of the two kernels is asked for."""
    of_down = ("w_down_EFD", "b_down_ED")
    return {
        name: torch.empty_like(weight, dtype=dtype)
        for name, weight in weights._asdict().items()
        if weight is not None and (want_down if name in of_down else want_up)
    }


def _in_order(x_TD: Tensor, *gradients: Tensor | None, by_name: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of x, the six weights and the rows' weights; an operator cannot give None, so empty for what is absent."""
    dx_TD, dweight_R = gradients
    found = (dx_TD, *(by_name.get(name) for name in Weights._fields), dweight_R)
    return [x_TD.new_empty(0) if gradient is None else gradient for gradient in found]


def _gradients_fake(dy_TD, x_TD, *rest):
    weights, weight_R, main_gradients = Weights(*rest[:6]), rest[6], rest[15]
    gradient_dtype, want_x, want_up, want_down, want_weight = rest[-5:]
    fresh = {} if main_gradients else _gradients_like(weights, gradient_dtype, want_up, want_down)
    dx_TD = torch.empty_like(x_TD) if want_x else None
    dweight_R = torch.empty_like(weight_R) if want_weight else None
    return _in_order(x_TD, dx_TD, dweight_R, by_name=fresh)


# The same function twice, because what changes its arguments cannot be traced: only main gradients cost torch.compile.
_backward = torch.library.custom_op("moe_triton::expert_ffn_backward", _gradients, mutates_args=())
_backward_into = torch.library.custom_op(
    "moe_triton::expert_ffn_backward_into", _gradients, mutates_args=("main_gradients",)
)
_backward.register_fake(_gradients_fake)
_backward_into.register_fake(_gradients_fake)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the kept pre-activations have no gradient: zeros of their size must not be made
    *tensors, ctx.tile_rows, activation, alpha, limit, ctx.weigh_input, ctx.kept, ctx.gradient_dtype, main_gradients = (
        inputs
    )
    ctx.activation = (activation, alpha, limit)
    # Aliases with a version of their own: main gradients change between forward and backward, and that is what they are for.
    ctx.main_gradients = [gradient.data for gradient in main_gradients]
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx, dy_TD, _dgate, _dup):
    if dy_TD is None:
        return (*[None] * 21, [None] * len(ctx.main_gradients))
    want_x, *want, want_weight = ctx.needs_input_grad[:8]
    want_up, want_down = any(want[i] for i in (0, 1, 3, 4)), want[2] or want[5]
    backward = _backward_into if ctx.main_gradients else _backward
    gradients = backward(
        dy_TD.contiguous(),
        *ctx.saved_tensors,
        ctx.main_gradients,
        ctx.tile_rows,
        *ctx.activation,
        ctx.weigh_input,
        ctx.kept,
        ctx.gradient_dtype,
        want_x,
        want_up,
        want_down,
        want_weight,
    )
    dx_TD, *of_weights, dweight_R = (
        gradient if want else None for gradient, want in zip(gradients, ctx.needs_input_grad, strict=False)
    )
    if ctx.main_gradients:
        of_weights = [None] * len(of_weights)
    return (dx_TD, *of_weights, dweight_R, *[None] * 13, [None] * len(ctx.main_gradients))


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _checked(x_TD: Tensor, weights: Weights, activation: str) -> None:
    """Shapes and types that belong together; a ValueError names what does not."""
    known = (*GATED_ACTIVATIONS, *PLAIN_ACTIVATIONS)
    if activation not in known:
        raise ValueError(f"activation {activation!r} is unknown: use one of {', '.join(known)}")
    gated = activation in GATED_ACTIVATIONS
    if gated != (weights.w_gate_EDF is not None):
        raise ValueError(f"{activation} takes {'' if gated else 'no '}w_gate_EDF: it has {'a' if gated else 'no'} gate")
    if (weights.b_up_EF is not None and gated) != (weights.b_gate_EF is not None):
        raise ValueError(
            "b_gate_EF and b_up_EF come together for an activation with a gate, and b_up_EF alone without one"
        )
    E, F, D = weights.w_down_EFD.shape
    sizes = {"E": E, "D": D, "F": F}
    for name, tensor in weights._asdict().items():
        shape = tuple(sizes[letter] for letter in name.rsplit("_", 1)[1])
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x_TD.dtype):
            raise ValueError(
                f"{name} is {list(tensor.shape)} of {tensor.dtype} but must be {list(shape)} of {x_TD.dtype}: "
                f"one type for x and all weights, and the shapes of w_down_EFD {[E, F, D]}"
            )
    if x_TD.shape[1] != D:
        raise ValueError(f"x_TD has {x_TD.shape[1]} columns but w_down_EFD gives {D}: they must be equal")


def planned_ffn(
    x_TD: Tensor,
    weights: Weights,
    weight_R: Tensor,
    plan: RoutingPlan,
    *,
    activation: str = "swiglu",
    alpha: float = ALPHA,
    limit: float = LIMIT,
    weight_on: Literal["output", "input"] = "output",
    recompute: Literal["activation", "hidden"] = "activation",
    gradient_dtype: torch.dtype | None = None,
    main_gradients: dict[str, Tensor] | None = None,
    precision: Literal["native", "fp8_row", "fp8_block"] = "native",
) -> Tensor:
    """`expert_ffn` over a plan that was made before, by `routing_plan` or by `plan_from_order`.

    main_gradients: by name, as in Weights, a contiguous tensor of any float type and the shape of each weight, to which
    backward adds in the product's epilogue; autograd then gives no gradient for the weights. Not under torch.compile, and
    not with 8-bit products.
    """
    _checked(x_TD, weights, activation)
    present = [name for name, weight in weights._asdict().items() if weight is not None]
    if main_gradients is not None and set(main_gradients) != set(present):
        raise ValueError(f"main_gradients has {sorted(main_gradients)} but must have one for each of {present}")
    differentiable = (x_TD, weight_R, *(w for w in weights if w is not None))
    keep = recompute == "activation" and torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    if precision != "native":
        if weight_on == "input" or main_gradients is not None or activation == "swiglu_oai":
            raise ValueError(
                f"precision {precision!r} takes weight_on='output', no main_gradients and no activation 'swiglu_oai': use "
                "precision='native'"
            )
        options = {"precision": precision, "activation": activation, "keep": keep, "gradient_dtype": gradient_dtype}
        return fp8_ffn(x_TD, weights, weight_R, plan, **options)
    return _forward(
        x_TD.contiguous(),
        *(None if weight is None else weight.contiguous() for weight in weights),
        weight_R.contiguous(),
        plan.token_P,
        plan.row_P,
        plan.reverse_R,
        plan.offsets_E1,
        plan.token_offsets,
        plan.schedule,
        plan.tile_rows,
        activation,
        alpha,
        limit,
        weight_on == "input",
        keep,
        gradient_dtype or x_TD.dtype,
        [main_gradients[name] for name in present] if main_gradients is not None else [],
    )[0]


def expert_ffn(
    x_TD: Tensor,
    w_gate_EDF: Tensor | None,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    token_R: Tensor,
    expert_R: Tensor,
    weight_R: Tensor,
    token_offsets: Tensor,
    *,
    num_experts: int,
    activation: str = "swiglu",
    alpha: float = ALPHA,
    limit: float = LIMIT,
    b_gate_EF: Tensor | None = None,
    b_up_EF: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    weight_on: Literal["output", "input"] = "output",
    recompute: Literal["activation", "hidden"] = "activation",
    gradient_dtype: torch.dtype | None = None,
    capacity: int | None = None,
    tokens_per_group: int | None = None,
    precision: Literal["native", "fp8_row", "fp8_block"] = "native",
) -> Tensor:
    """Every token through its experts, weighted and summed: y_TD [T, D], of x_TD's type.

    x_TD [T, D]; w_gate_EDF, w_up_EDF [E, D, F], w_down_EFD [E, F, D], biases [E, F] and [E, D], all of x_TD's type (float16,
    bfloat16, float32; sums are float32). Rows in ascending token order: token_R, expert_R [R] int, expert E for a row that
    goes nowhere; weight_R [R] float32; token_offsets [T+1] int. Gradients: x, weights, biases, weight_R. Activations: swiglu,
    geglu and swiglu_oai (with alpha and limit) with w_gate_EDF, relu2, gelu and silu without. weight_on "input" multiplies x
    by the row's weight instead of the expert's output. recompute "hidden" keeps x only and computes the pre-activations
    again. gradient_dtype: type in which the weights' gradients are written; autograd casts it back unless the parameter's
    `grad_dtype` allows it. capacity, with tokens_per_group: rows that an expert takes from each group of tokens; later ones
    add exactly nothing to any result. precision: 8-bit products forward and for the gradient of x (moe_triton.low_precision),
    without biases and with weight_on "output".
    """
    limits = {"capacity": capacity, "tokens_per_group": tokens_per_group}
    plan = routing_plan(token_R, expert_R, token_offsets, num_experts=num_experts, **limits)
    weights = Weights(w_gate_EDF, w_up_EDF, w_down_EFD, b_gate_EF, b_up_EF, b_down_ED)
    return planned_ffn(
        x_TD,
        weights,
        weight_R,
        plan,
        activation=activation,
        alpha=alpha,
        limit=limit,
        weight_on=weight_on,
        recompute=recompute,
        gradient_dtype=gradient_dtype,
        precision=precision,
    )


def compile_cases() -> list[CompileCase]:
    """Forward and backward through the public function: the default, and every option that changes a kernel's body."""

    def case(name: str, ops: tuple[str, ...] = OPS, **options) -> CompileCase:
        return CompileCase(name, True, lambda dtype, D, F: _trial(dtype, D, F, **options), ops=ops)

    return [
        case("swiglu"),
        case("geglu_biased", activation="geglu", biased=True),
        case("swiglu_oai_biased", activation="swiglu_oai", biased=True),
        case("relu2_biased_input", activation="relu2", biased=True, weight_on="input"),
        case("recompute_hidden_float32_gradients", OPS[4:], recompute="hidden", gradient_dtype=torch.float32),
    ]


OPS = ("up", "down", "hidden_bwd", "input_bwd", "w_down_bwd", "w_up_bwd")
"""Names of these products in the tuning table."""


def _trial(dtype: torch.dtype, D: int, F: int, *, activation: str = "swiglu", biased: bool = False, **options) -> None:
    """One forward and backward of 8 experts and 2048 rows on unwritten CPU tensors."""
    T, E, K = 1024, 8, 2

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    gated = activation in GATED_ACTIVATIONS
    biases = {"b_up_EF": tensor(E, F), "b_down_ED": tensor(E, D)} if biased else {}
    if biased and gated:
        biases["b_gate_EF"] = tensor(E, F)
    y_TD = expert_ffn(
        tensor(T, D),
        tensor(E, D, F) if gated else None,
        tensor(E, D, F),
        tensor(E, F, D),
        torch.arange(T).repeat_interleave(K),
        torch.zeros(T * K, dtype=torch.int64),
        torch.zeros(T * K, requires_grad=True),
        torch.arange(T + 1) * K,
        num_experts=E,
        activation=activation,
        **biases,
        **options,
    )
    y_TD.backward(torch.empty_like(y_TD))
