"""Backward through W_down and the activation in one kernel, and the gradient of the rows' weights.

With s a row's weight, dA = dO·W_downᵀ (dO gathered by token, not weighted yet) and A = f(gate)·up recomputed from what was
kept, one epilogue writes d(gate), d(up) from s·dA, the weighted hidden rows s·A that dW_down needs, and parts of

    ds = <dO, A·W_down + b_down> = <dA, A> + <dO, b_down>,

so the expert's output is never needed. Eager torch would keep A and the outputs, and pass over R·F six times. The
accumulator goes through the epilogue in column slices: at once it does not fit into registers beside gate, up and their gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton.activation import GATED_ACTIVATIONS, activate_bwd
from moe_triton.plan import RoutingPlan
from moe_triton.runtime import INTERPRETING, cdiv, launch
from moe_triton.tiles import Weights, column_slices, config, multiply_add, numerics, rows_of_tile, swizzle, within


@triton.jit
def _epilogue(
    dhidden,
    weight,
    row,
    exists,
    f,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    weighted_ptr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATED: tl.constexpr,
    WEIGH_INPUT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One column slice: writes dgate, dup and the hidden rows; gives the slice's part of ds."""
    in_slice = exists[:, None] & within(f, F, MASKED)[None, :]
    at = row[:, None] * F + f[None, :]
    up = tl.load(up_ptr + at, mask=in_slice, other=0).to(dhidden.dtype)
    gate = up
    if GATED:
        gate = tl.load(gate_ptr + at, mask=in_slice, other=0).to(dhidden.dtype)
    hidden, dgate, dup = activate_bwd(gate, up, dhidden, ACTIVATION, GATED, ALPHA, LIMIT)
    dweight = tl.sum(dhidden * hidden, axis=1)
    if not WEIGH_INPUT:
        hidden *= weight[:, None]
        dgate *= weight[:, None]
        dup *= weight[:, None]
    tl.store(weighted_ptr + at, hidden, mask=in_slice)
    tl.store(dup_ptr + at, dup, mask=in_slice)
    if GATED:
        tl.store(dgate_ptr + at, dgate, mask=in_slice)
    return dweight


@triton.jit
def hidden_bwd_kernel(
    dy_ptr,  # [T, D] bf16
    w_down_ptr,  # [E, F, D] bf16
    b_down_ptr,  # [E, D] bf16
    weight_ptr,  # [R] f32
    token_ptr,  # [P] int
    row_ptr,  # [P] int
    offsets_ptr,  # [E + 1] int64
    schedule_ptr,  # [tiles, 2] int32
    gate_ptr,  # [P, F] bf16
    up_ptr,  # [P, F] bf16
    dgate_ptr,  # [P, F] bf16
    dup_ptr,  # [P, F] bf16
    weighted_ptr,  # [P, F] bf16
    parts_ptr,  # [F tiles, P] f32
    num_tiles,
    num_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
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
    """dgate, dup = s·f'·(dO·W_downᵀ), s·A and this column tile's part of ds, for one tile of rows of one expert."""
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    expert, first, exists = rows_of_tile(schedule_ptr, offsets_ptr, tile, BLOCK_M)
    if expert < 0:
        return
    row = tl.arange(0, BLOCK_M)
    token = tl.load(token_ptr + first + row, mask=exists, other=0).to(tl.int64)
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_f = within(f, F, BLOCK_N)
    d = tl.arange(0, BLOCK_K)
    dy_ptr += (token * D)[:, None]
    w_down_ptr += expert * (F * D)
    at_w = f[None, :] * D + d[:, None]
    dweight = tl.zeros([BLOCK_M], dtype=ACC)
    # a loop of its own, in one column tile: in the one below it would cost all of them registers
    if BIASED and column == 0:
        for start in range(0, D, BLOCK_K):
            in_d = within(start + d, D, BLOCK_K)
            b_down = tl.load(b_down_ptr + expert * D + start + d, mask=in_d, other=0).to(ACC)
            dy = tl.load(dy_ptr + (start + d)[None, :], mask=exists[:, None] & in_d[None, :], other=0)
            dweight += tl.sum(dy.to(ACC) * b_down[None, :], axis=1)
    dhidden = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, D, BLOCK_K):
        in_d = within(start + d, D, BLOCK_K)
        dy = tl.load(dy_ptr + (start + d)[None, :], mask=exists[:, None] & in_d[None, :], other=0)
        w_down = tl.load(w_down_ptr + at_w, mask=in_d[:, None] & in_f[None, :], other=0)
        dhidden = multiply_add(dy, w_down, dhidden, UPCAST, PRECISION)
        at_w += BLOCK_K
    weight = tl.load(weight_ptr + tl.load(row_ptr + first + row, mask=exists, other=0), mask=exists, other=0).to(ACC)
    up_ptr += first * F
    if GATED:
        gate_ptr += first * F
        dgate_ptr += first * F
    dup_ptr += first * F
    weighted_ptr += first * F
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    f = column * BLOCK_N + tl.arange(0, WIDTH)
    slices = column_slices(dhidden, SLICES)
    for i in tl.static_range(SLICES):
        dweight += _epilogue(
            slices[i],
            weight,
            row,
            exists,
            f + i * WIDTH,
            gate_ptr,
            up_ptr,
            dgate_ptr,
            dup_ptr,
            weighted_ptr,
            F,
            ACTIVATION,
            ALPHA,
            LIMIT,
            GATED,
            WEIGH_INPUT,
            BLOCK_N,
        )
    if not WEIGH_INPUT:
        tl.store(parts_ptr + column.to(tl.int64) * num_rows + first + row, dweight, mask=exists)


@triton.jit
def row_weight_bwd_kernel(
    parts_ptr,  # [parts, P] f32
    reverse_ptr,  # [R] int
    num_computed_ptr,  # [] int64
    dweight_ptr,  # [R] f32
    num_rows,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ds of BLOCK rows in the routing's order: the sum of a row's parts, and 0 for a row that went nowhere."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    place = tl.load(reverse_ptr + row, mask=inside, other=0).to(tl.int64)
    computed = inside & (place < tl.load(num_computed_ptr))
    total = tl.load(parts_ptr + place, mask=computed, other=0)
    for _ in range(1, PARTS):
        place += num_rows
        total += tl.load(parts_ptr + place, mask=computed, other=0)
    tl.store(dweight_ptr + row, total, mask=inside)


def hidden_bwd(
    dy_TD: Tensor,
    gate_PF: Tensor,
    up_PF: Tensor,
    weights: Weights,
    weight_R: Tensor,
    plan: RoutingPlan,
    *,
    activation: str,
    alpha: float,
    limit: float,
    weigh_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dgate_PF, dup_PF, weighted_PF, parts): weighted is s·A, and the sum of `parts` [tiles of F, P] over its first dim is ds.

    With `weigh_input` nothing is weighted (the caller weighs dX and x instead) and `parts` is empty.
    """
    D, (P, F) = dy_TD.shape[1], up_PF.shape
    options = config("hidden_bwd", plan, D=D, F=F, dtype=dy_TD.dtype)
    columns, tiles = cdiv(F, options["BLOCK_N"]), plan.schedule.shape[0]
    dgate_PF, dup_PF, weighted_PF = torch.empty_like(gate_PF), torch.empty_like(up_PF), torch.empty_like(up_PF)
    parts = up_PF.new_empty(0 if weigh_input else columns, P, dtype=torch.promote_types(up_PF.dtype, torch.float32))
    launch(
        hidden_bwd_kernel,
        (tiles * columns,),
        dy_TD,
        weights.w_down_EFD,
        weights.b_down_ED,
        weight_R,
        plan.token_P,
        plan.row_P,
        plan.offsets_E1,
        plan.schedule,
        gate_PF,
        up_PF,
        dgate_PF,
        dup_PF,
        weighted_PF,
        parts,
        tiles,
        P,
        D=D,
        F=F,
        ACTIVATION=activation,
        ALPHA=alpha,
        LIMIT=limit,
        GATED=activation in GATED_ACTIVATIONS,
        BIASED=weights.b_down_ED is not None and not weigh_input,
        WEIGH_INPUT=weigh_input,
        **numerics(dy_TD),
        **options,
    )
    return dgate_PF, dup_PF, weighted_PF, parts


def row_weight_bwd(parts: Tensor, weight_R: Tensor, plan: RoutingPlan) -> Tensor:
    """The gradient of weight_R: each row's parts [n, P] summed, in the routing's order; exactly 0 where a row goes nowhere."""
    R = plan.reverse_R.shape[0]
    dweight_R = torch.empty_like(weight_R)
    block = 128 if INTERPRETING else 1024
    launch(
        row_weight_bwd_kernel,
        (cdiv(R, block),),
        parts,
        plan.reverse_R,
        plan.offsets_E1[-1:],
        dweight_R,
        R,
        PARTS=parts.shape[0],
        BLOCK=block,
    )
    return dweight_R
