"""First product of the expert FFN: rows gathered from x, times W_gate and W_up, through the activation.

Eager torch would copy the gathered rows (R·D), then write gate, up, their activation and its product. Here the gather is in
the load and the activation in the epilogue; written are the pre-activations (kept for backward) and the hidden rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_triton.activation import GATED_ACTIVATIONS, activate
from moe_triton.plan import RoutingPlan
from moe_triton.runtime import cdiv, launch
from moe_triton.tiles import Weights, column_slices, config, multiply_add, numerics, rows_of_tile, swizzle, within


@triton.jit
def up_fwd_kernel(
    x_ptr,  # [T, D] bf16
    w_gate_ptr,  # [E, D, F] bf16
    w_up_ptr,  # [E, D, F] bf16
    b_gate_ptr,  # [E, F] bf16
    b_up_ptr,  # [E, F] bf16
    weight_ptr,  # [R] f32
    token_ptr,  # [P] int
    row_ptr,  # [P] int
    offsets_ptr,  # [E + 1] int64
    schedule_ptr,  # [tiles, 2] int32
    gate_ptr,  # [P, F] bf16
    up_ptr,  # [P, F] bf16
    hidden_ptr,  # [P, F] bf16
    num_tiles,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGH_INPUT: tl.constexpr,
    KEEP: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """gate = x·W_gate, up = x·W_up, hidden = f(gate)·up, for one tile of rows of one expert and BLOCK_N hidden columns."""
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    expert, first, exists = rows_of_tile(schedule_ptr, offsets_ptr, tile, BLOCK_M)
    if expert < 0:
        return
    row = tl.arange(0, BLOCK_M)
    token = tl.load(token_ptr + first + row, mask=exists, other=0).to(tl.int64)
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_f = within(f, F, BLOCK_N)
    d = tl.arange(0, BLOCK_K)
    x_ptr += (token * D)[:, None]
    at_w = d[:, None] * F + f[None, :]
    up_w_ptr = w_up_ptr + expert * (D * F)
    if GATED:
        gate_w_ptr = w_gate_ptr + expert * (D * F)
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, D, BLOCK_K):
        in_d = within(start + d, D, BLOCK_K)
        in_w = in_d[:, None] & in_f[None, :]
        x = tl.load(x_ptr + (start + d)[None, :], mask=exists[:, None] & in_d[None, :], other=0)
        if GATED:
            gate = multiply_add(x, tl.load(gate_w_ptr + at_w, mask=in_w, other=0), gate, UPCAST, PRECISION)
        up = multiply_add(x, tl.load(up_w_ptr + at_w, mask=in_w, other=0), up, UPCAST, PRECISION)
        at_w += BLOCK_K * F
    if WEIGH_INPUT:  # (s·x)·W = s·(x·W), scaled before anything is rounded
        weight = tl.load(weight_ptr + tl.load(row_ptr + first + row, mask=exists, other=0), mask=exists, other=0).to(
            ACC
        )
        gate *= weight[:, None]
        up *= weight[:, None]
    if BIASED:
        if GATED:
            gate += tl.load(b_gate_ptr + expert * F + f, mask=in_f, other=0).to(ACC)[None, :]
        up += tl.load(b_up_ptr + expert * F + f, mask=in_f, other=0).to(ACC)[None, :]
    if KEEP:
        up_ptr += first * F
        if GATED:
            gate_ptr += first * F
    hidden_ptr += first * F
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    gates = column_slices(gate, SLICES)
    ups = column_slices(up, SLICES)
    for i in tl.static_range(SLICES):
        f = column * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)
        at = row[:, None] * F + f[None, :]
        in_slice = exists[:, None] & within(f, F, BLOCK_N)[None, :]
        if KEEP:
            if GATED:
                tl.store(gate_ptr + at, gates[i], mask=in_slice)
            tl.store(up_ptr + at, ups[i], mask=in_slice)
        tl.store(hidden_ptr + at, activate(gates[i], ups[i], ACTIVATION, GATED), mask=in_slice)


def up(
    x_TD: Tensor,
    weights: Weights,
    weight_R: Tensor,
    plan: RoutingPlan,
    *,
    activation: str,
    weigh_input: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gate_PF, up_PF, hidden_PF) of the plan's rows; the first two are empty unless `keep`, gate also without a gate."""
    D, F, P = x_TD.shape[1], weights.w_up_EDF.shape[2], plan.token_P.shape[0]
    gated = activation in GATED_ACTIVATIONS
    gate_PF, up_PF = x_TD.new_empty(P if keep and gated else 0, F), x_TD.new_empty(P if keep else 0, F)
    hidden_PF = x_TD.new_empty(P, F)
    options = config("up", plan, D=D, F=F, dtype=x_TD.dtype)
    tiles = plan.schedule.shape[0]
    launch(
        up_fwd_kernel,
        (tiles * cdiv(F, options["BLOCK_N"]),),
        x_TD,
        weights.w_gate_EDF,
        weights.w_up_EDF,
        weights.b_gate_EF,
        weights.b_up_EF,
        weight_R,
        plan.token_P,
        plan.row_P,
        plan.offsets_E1,
        plan.schedule,
        gate_PF,
        up_PF,
        hidden_PF,
        tiles,
        D=D,
        F=F,
        ACTIVATION=activation,
        GATED=gated,
        BIASED=weights.b_up_EF is not None,
        WEIGH_INPUT=weigh_input,
        KEEP=keep,
        **numerics(x_TD),
        **options,
    )
    return gate_PF, up_PF, hidden_PF
