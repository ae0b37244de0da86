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
from moe_triton.tiles import Weights, multiply_add, numerics, rows_of_tile, swizzle, within


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    left_right = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(left_right, (0, 2, 1)))


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
    hidden, dgate, dup = activate_bwd(gate, up, dhidden, ACTIVATION, GATED)
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
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert, row, exists = rows_of_tile(schedule_ptr, offsets_ptr, tile, BLOCK_M)
    if expert < 0:
        return
    token = tl.load(token_ptr + row, mask=exists, other=0).to(tl.int64)
    f = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_f = within(f, F, BLOCK_N)
    d = tl.arange(0, BLOCK_K)
    dy_ptr += (token * D)[:, None]
    w_down_ptr += expert * (F * D)
    at_w = f[None, :] * D + d[:, None]
    dhidden = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    dweight = tl.zeros([BLOCK_M], dtype=ACC)
    for start in range(0, D, BLOCK_K):
        in_d = within(start + d, D, BLOCK_K)
        dy = tl.load(dy_ptr + (start + d)[None, :], mask=exists[:, None] & in_d[None, :], other=0)
        w_down = tl.load(w_down_ptr + at_w, mask=in_d[:, None] & in_f[None, :], other=0)
        dhidden = multiply_add(dy, w_down, dhidden, UPCAST, PRECISION)
        if BIASED:
            b_down = tl.load(b_down_ptr + expert * D + start + d, mask=in_d, other=0).to(ACC)
            dweight += tl.sum(dy.to(ACC) * b_down[None, :], axis=1)
        at_w += BLOCK_K
    if BIASED:  # every column tile sees all of dO, and one of them may count it
        dweight = tl.where(column == 0, dweight, 0.0)
    weight = tl.load(weight_ptr + tl.load(row_ptr + row, mask=exists, other=0), mask=exists, other=0).to(ACC)
    WIDTH: tl.constexpr = BLOCK_N // SLICES
    f = column * BLOCK_N + tl.arange(0, WIDTH)
    if SLICES == 1:
        slices = (dhidden,)
    elif SLICES == 2:
        slices = _halves(dhidden)
    else:
        left, right = _halves(dhidden)
        slices = _halves(left) + _halves(right)
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
            GATED,
            WEIGH_INPUT,
            BLOCK_N,
        )
    if not WEIGH_INPUT:
        tl.store(parts_ptr + column.to(tl.int64) * num_rows + row, dweight, mask=exists)


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
    for part in range(1, PARTS):
        total += tl.load(parts_ptr + part * num_rows.to(tl.int64) + place, mask=computed, other=0)
    tl.store(dweight_ptr + row, total, mask=inside)
