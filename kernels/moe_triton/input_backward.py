"""Gradient of the gathered rows: dgate·W_gateᵀ + dup·W_upᵀ, two products in one accumulator, written once per row.

The gather's own backward, the sum of a token's rows, is combine.py. If the weight s multiplies the expert's input, rows are
weighted here, and ds = <dX before weighting, x> is left in parts, one per column tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton.plan import RoutingPlan
from moe_triton.runtime import cdiv, launch
from moe_triton.tiles import Weights, column_slices, config, multiply_add, numerics, rows_of_tile, swizzle, within


@triton.jit
def input_bwd_kernel(
    dgate_ptr,  # [P, F] bf16
    dup_ptr,  # [P, F] bf16
    w_gate_ptr,  # [E, D, F] bf16
    w_up_ptr,  # [E, D, F] bf16
    x_ptr,  # [T, D] bf16
    weight_ptr,  # [R] f32
    token_ptr,  # [P] int
    row_ptr,  # [P] int
    offsets_ptr,  # [E + 1] int64
    schedule_ptr,  # [tiles, 2] int32
    dx_ptr,  # [P, D] bf16
    parts_ptr,  # [D tiles, P] f32
    num_tiles,
    num_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    WEIGH_INPUT: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx = dgate·W_gateᵀ + dup·W_upᵀ for one tile of rows of one expert and BLOCK_N columns of D."""
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(D, BLOCK_N), GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    expert, first, exists = rows_of_tile(schedule_ptr, offsets_ptr, tile, BLOCK_M)
    if expert < 0:
        return
    row = tl.arange(0, BLOCK_M)
    d = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_d = within(d, D, BLOCK_N)
    f = tl.arange(0, BLOCK_K)
    at_rows = row[:, None] * F + f[None, :]
    dup_ptr += first * F
    at_w = d[None, :] * F + f[:, None]
    up_w_ptr = w_up_ptr + expert * (D * F)
    if GATED:
        dgate_ptr += first * F
        gate_w_ptr = w_gate_ptr + expert * (D * F)
    dx = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, F, BLOCK_K):
        in_f = within(start + f, F, BLOCK_K)
        in_rows = exists[:, None] & in_f[None, :]
        in_w = in_f[:, None] & in_d[None, :]
        dup = tl.load(dup_ptr + at_rows, mask=in_rows, other=0)
        dx = multiply_add(dup, tl.load(up_w_ptr + at_w, mask=in_w, other=0), dx, UPCAST, PRECISION)
        if GATED:
            dgate = tl.load(dgate_ptr + at_rows, mask=in_rows, other=0)
            dx = multiply_add(dgate, tl.load(gate_w_ptr + at_w, mask=in_w, other=0), dx, UPCAST, PRECISION)
        at_rows += BLOCK_K
        at_w += BLOCK_K
    dx_ptr += first * D
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    slices = column_slices(dx, SLICES)
    dweight = tl.zeros([BLOCK_M], dtype=ACC)
    if WEIGH_INPUT:
        token = tl.load(token_ptr + first + row, mask=exists, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + tl.load(row_ptr + first + row, mask=exists, other=0), mask=exists, other=0).to(
            ACC
        )
    for i in tl.static_range(SLICES):
        d = column * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)
        in_slice = exists[:, None] & within(d, D, BLOCK_N)[None, :]
        part = slices[i]
        if WEIGH_INPUT:
            x = tl.load(x_ptr + (token * D)[:, None] + d[None, :], mask=in_slice, other=0).to(ACC)
            dweight += tl.sum(part * x, axis=1)
            part *= weight[:, None]
        tl.store(dx_ptr + row[:, None] * D + d[None, :], part, mask=in_slice)
    if WEIGH_INPUT:
        tl.store(parts_ptr + column.to(tl.int64) * num_rows + first + row, dweight, mask=exists)


def input_bwd(
    dgate_PF: Tensor,
    dup_PF: Tensor,
    x_TD: Tensor,
    weights: Weights,
    weight_R: Tensor,
    plan: RoutingPlan,
    *,
    weigh_input: bool,
) -> tuple[Tensor, Tensor]:
    """(dx_PD, parts): gradient of each gathered row; `parts` [tiles of D, P] sum to ds with `weigh_input`, else empty."""
    D, (P, F) = x_TD.shape[1], dup_PF.shape
    options = config("input_bwd", plan, D=D, F=F, dtype=x_TD.dtype)
    columns, tiles = cdiv(D, options["BLOCK_N"]), plan.schedule.shape[0]
    dx_PD = x_TD.new_empty(P, D)
    parts = x_TD.new_empty(columns if weigh_input else 0, P, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    launch(
        input_bwd_kernel,
        (tiles * columns,),
        dgate_PF,
        dup_PF,
        weights.w_gate_EDF,
        weights.w_up_EDF,
        x_TD,
        weight_R,
        plan.token_P,
        plan.row_P,
        plan.offsets_E1,
        plan.schedule,
        dx_PD,
        parts,
        tiles,
        P,
        D=D,
        F=F,
        GATED=weights.w_gate_EDF is not None,
        WEIGH_INPUT=weigh_input,
        SLICES=4 if weigh_input else 1,
        **numerics(x_TD),
        **options,
    )
    return dx_PD, parts
