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
from moe_triton.tiles import (
    Weights,
    column_slices,
    config,
    multiply_add,
    num_programs,
    numerics,
    operand,
    rows_of_tile,
    swizzle,
    within,
)


@triton.jit
def up_fwd_kernel(
    x_ptr,  # [T, D] bf16
    w_gate_ptr,  # [E, D, F] bf16, with TMA its descriptor
    w_up_ptr,  # [E, D, F] bf16, likewise
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
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
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
    TMA: tl.constexpr,
):
    """gate = x·W_gate, up = x·W_up, hidden = f(gate)·up, for one tile of rows of one expert and BLOCK_N hidden columns.

    With TMA a program does every num_programs-th tile, and the weights come by descriptor; else one tile.
    """
    columns = tl.cdiv(F, BLOCK_N)
    program = tl.program_id(0)
    end = num_tiles * columns if TMA else program + 1
    for index in range(program, end, tl.num_programs(0)):
        tile, column = swizzle(index, num_tiles, columns, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
        expert, first, exists = rows_of_tile(schedule_ptr, offsets_ptr, tile, BLOCK_M)
        if expert >= 0:
            row = tl.arange(0, BLOCK_M)
            token = tl.load(token_ptr + first + row, mask=exists, other=0).to(tl.int64)
            f = column * BLOCK_N + tl.arange(0, BLOCK_N)
            in_f = within(f, F, BLOCK_N)
            d = tl.arange(0, BLOCK_K)
            at_x = x_ptr + (token * D)[:, None]
            at_w = d[:, None] * F + f[None, :]
            gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
            up = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
            for start in range(0, D, BLOCK_K):
                in_d = within(start + d, D, BLOCK_K)
                in_w = in_d[:, None] & in_f[None, :]
                x = tl.load(at_x + (start + d)[None, :], mask=exists[:, None] & in_d[None, :], other=0)
                if GATED:
                    if TMA:
                        w = w_gate_ptr.load([expert.to(tl.int32), start, column * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
                    else:
                        w = tl.load(w_gate_ptr + expert * (D * F) + at_w, mask=in_w, other=0)
                    gate = multiply_add(x, w, gate, UPCAST, PRECISION)
                if TMA:
                    w = w_up_ptr.load([expert.to(tl.int32), start, column * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
                else:
                    w = tl.load(w_up_ptr + expert * (D * F) + at_w, mask=in_w, other=0)
                up = multiply_add(x, w, up, UPCAST, PRECISION)
                at_w += BLOCK_K * F
            if WEIGH_INPUT:  # (s·x)·W = s·(x·W), scaled before anything is rounded
                place = tl.load(row_ptr + first + row, mask=exists, other=0)
                weight = tl.load(weight_ptr + place, mask=exists, other=0).to(ACC)
                gate *= weight[:, None]
                up *= weight[:, None]
            if BIASED:
                if GATED:
                    gate += tl.load(b_gate_ptr + expert * F + f, mask=in_f, other=0).to(ACC)[None, :]
                up += tl.load(b_up_ptr + expert * F + f, mask=in_f, other=0).to(ACC)[None, :]
            WIDTH: tl.constexpr = BLOCK_N // SLICES
            gates = column_slices(gate, SLICES)
            ups = column_slices(up, SLICES)
            for i in tl.static_range(SLICES):
                f = column * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)
                at = row[:, None] * F + f[None, :]
                in_slice = exists[:, None] & within(f, F, BLOCK_N)[None, :]
                if KEEP:
                    if GATED:
                        tl.store(gate_ptr + first * F + at, gates[i], mask=in_slice)
                    tl.store(up_ptr + first * F + at, ups[i], mask=in_slice)
                hidden = activate(gates[i], ups[i], ACTIVATION, GATED, ALPHA, LIMIT)
                tl.store(hidden_ptr + first * F + at, hidden, mask=in_slice)


def up(
    x_TD: Tensor,
    weights: Weights,
    weight_R: Tensor,
    plan: RoutingPlan,
    *,
    activation: str,
    alpha: float,
    limit: float,
    weigh_input: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gate_PF, up_PF, hidden_PF) of the plan's rows; the first two are empty unless `keep`, gate also without a gate."""
    D, F, P = x_TD.shape[1], weights.w_up_EDF.shape[2], plan.token_P.shape[0]
    gated = activation in GATED_ACTIVATIONS
    gate_PF, up_PF = x_TD.new_empty(P if keep and gated else 0, F), x_TD.new_empty(P if keep else 0, F)
    hidden_PF = x_TD.new_empty(P, F)
    described = (weights.w_gate_EDF, weights.w_up_EDF)
    options = config("up", plan, D=D, F=F, dtype=x_TD.dtype, described=described)
    tiles = plan.schedule.shape[0]
    w_gate, w_up = (operand(w, (1, options["BLOCK_K"], options["BLOCK_N"]), options["TMA"]) for w in described)
    launch(
        up_fwd_kernel,
        (num_programs(tiles * cdiv(F, options["BLOCK_N"]), options["TMA"]),),
        x_TD,
        w_gate,
        w_up,
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
        ALPHA=alpha,
        LIMIT=limit,
        GATED=gated,
        BIASED=weights.b_up_EF is not None,
        WEIGH_INPUT=weigh_input,
        KEEP=keep,
        **numerics(x_TD),
        **options,
    )
    return gate_PF, up_PF, hidden_PF
