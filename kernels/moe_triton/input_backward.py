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
def input_bwd_kernel(
    dgate_ptr,  # [P, F] bf16, with TMA its descriptor
    dup_ptr,  # [P, F] bf16, likewise
    w_gate_ptr,  # [E, D, F] bf16, likewise
    w_up_ptr,  # [E, D, F] bf16, likewise
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
    TMA: tl.constexpr,
):
    """dx = dgate·W_gateᵀ + dup·W_upᵀ for one tile of rows of one expert and BLOCK_N columns of D; TMA as in up_fwd_kernel."""
    columns = tl.cdiv(D, BLOCK_N)
    program = tl.program_id(0)
    end = num_tiles * columns if TMA else program + 1
    for index in range(program, end, tl.num_programs(0)):
        tile, column = swizzle(index, num_tiles, columns, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
        expert, first, exists = rows_of_tile(schedule_ptr, offsets_ptr, tile, BLOCK_M)
        if expert >= 0:
            row = tl.arange(0, BLOCK_M)
            d = column * BLOCK_N + tl.arange(0, BLOCK_N)
            in_d = within(d, D, BLOCK_N)
            f = tl.arange(0, BLOCK_K)
            at_rows = row[:, None] * F + f[None, :]
            at_w = d[None, :] * F + f[:, None]
            dx = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
            for start in range(0, F, BLOCK_K):
                in_f = within(start + f, F, BLOCK_K)
                in_rows = exists[:, None] & in_f[None, :]
                in_w = in_f[:, None] & in_d[None, :]
                if TMA:  # rows past the expert's end are another's: computed, and not stored
                    dup = dup_ptr.load([first.to(tl.int32), start])
                    w = w_up_ptr.load([expert.to(tl.int32), column * BLOCK_N, start]).reshape(BLOCK_N, BLOCK_K).T
                else:
                    dup = tl.load(dup_ptr + first * F + at_rows, mask=in_rows, other=0)
                    w = tl.load(w_up_ptr + expert * (D * F) + at_w, mask=in_w, other=0)
                dx = multiply_add(dup, w, dx, UPCAST, PRECISION)
                if GATED:
                    if TMA:
                        dgate = dgate_ptr.load([first.to(tl.int32), start])
                        w = w_gate_ptr.load([expert.to(tl.int32), column * BLOCK_N, start]).reshape(BLOCK_N, BLOCK_K).T
                    else:
                        dgate = tl.load(dgate_ptr + first * F + at_rows, mask=in_rows, other=0)
                        w = tl.load(w_gate_ptr + expert * (D * F) + at_w, mask=in_w, other=0)
                    dx = multiply_add(dgate, w, dx, UPCAST, PRECISION)
                at_rows += BLOCK_K
                at_w += BLOCK_K
            WIDTH: tl.constexpr = BLOCK_N // SLICES
            slices = column_slices(dx, SLICES)
            dweight = tl.zeros([BLOCK_M], dtype=ACC)
            if WEIGH_INPUT:
                token = tl.load(token_ptr + first + row, mask=exists, other=0).to(tl.int64)
                place = tl.load(row_ptr + first + row, mask=exists, other=0)
                weight = tl.load(weight_ptr + place, mask=exists, other=0).to(ACC)
            for i in tl.static_range(SLICES):
                d = column * BLOCK_N + i * WIDTH + tl.arange(0, WIDTH)
                in_slice = exists[:, None] & within(d, D, BLOCK_N)[None, :]
                part = slices[i]
                if WEIGH_INPUT:
                    x = tl.load(x_ptr + (token * D)[:, None] + d[None, :], mask=in_slice, other=0).to(ACC)
                    dweight += tl.sum(part * x, axis=1)
                    part *= weight[:, None]
                tl.store(dx_ptr + first * D + row[:, None] * D + d[None, :], part, mask=in_slice)
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
    rows, gated = (dgate_PF, dup_PF), weights.w_gate_EDF is not None
    described = (*rows[not gated :], weights.w_gate_EDF, weights.w_up_EDF)
    options = config("input_bwd", plan, D=D, F=F, dtype=x_TD.dtype, described=described)
    M, N, K, tma = (options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA"))
    columns, tiles = cdiv(D, N), plan.schedule.shape[0]
    dx_PD = x_TD.new_empty(P, D)
    parts = x_TD.new_empty(columns if weigh_input else 0, P, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    launch(
        input_bwd_kernel,
        (num_programs(tiles * columns, tma),),
        operand(dgate_PF, (M, K), tma) if gated else None,
        operand(dup_PF, (M, K), tma),
        operand(weights.w_gate_EDF, (1, N, K), tma),
        operand(weights.w_up_EDF, (1, N, K), tma),
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
        GATED=gated,
        WEIGH_INPUT=weigh_input,
        SLICES=4 if weigh_input else 1,
        **numerics(x_TD),
        **options,
    )
    return dx_PD, parts
