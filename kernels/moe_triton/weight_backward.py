"""Gradients of the experts' weights: products over each expert's rows, whose number only the device knows.

dW_down = (s·A)ᵀ·dO and dW_gate, dW_up = xᵀ·dgate, xᵀ·dup, with x and dO gathered by token inside the load; eager torch would
copy both. One program owns one tile of one expert's weight and walks all its rows: no atomics, and an expert without
rows gets its zeros from the same store, so nothing is filled beforehand. Optionally the tile is added to what is there (a
float32 main gradient). Biases are summed by the programs of the first row of tiles, which see every row anyway.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_triton.plan import RoutingPlan
from moe_triton.runtime import cdiv, launch
from moe_triton.tiles import config, multiply_add, numerics, swizzle, within


@triton.jit
def _write(out_ptr, at, tile, mask, ADD: tl.constexpr):
    """Store a tile of a gradient, or add it to what is there."""
    if ADD:
        tile += tl.load(out_ptr + at, mask=mask, other=0).to(tile.dtype)
    tl.store(out_ptr + at, tile, mask=mask)


@triton.jit
def w_down_bwd_kernel(
    weighted_ptr,  # [P, F] bf16
    dy_ptr,  # [T, D] bf16
    weight_ptr,  # [R] f32
    token_ptr,  # [P] int
    row_ptr,  # [P] int
    offsets_ptr,  # [E + 1] int64
    dw_down_ptr,  # [E, F, D] bf16 or f32
    db_down_ptr,  # [E, D] bf16 or f32
    D: tl.constexpr,
    F: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGH_INPUT: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dW_down[e] = (s·A)ᵀ·dO, db_down[e] = Σ s·dO, for one [BLOCK_M, BLOCK_N] tile of [F, D]."""
    F_TILES: tl.constexpr = tl.cdiv(F, BLOCK_M)
    D_TILES: tl.constexpr = tl.cdiv(D, BLOCK_N)
    expert = (tl.program_id(0) // (F_TILES * D_TILES)).to(tl.int64)
    f_tile, d_tile = swizzle(tl.program_id(0) % (F_TILES * D_TILES), F_TILES, D_TILES, GROUP)
    f = f_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = d_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_f = within(f, F, BLOCK_M)
    in_d = within(d, D, BLOCK_N)
    first = tl.load(offsets_ptr + expert)
    num_rows = (tl.load(offsets_ptr + expert + 1) - first).to(tl.int32)
    dw = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    db = tl.zeros([BLOCK_N], dtype=ACC)
    row = tl.arange(0, BLOCK_K)
    at_rows = row[None, :] * F + f[:, None]
    weighted_ptr += first * F
    for start in range(0, num_rows, BLOCK_K):
        exists = start + row < num_rows
        token = tl.load(token_ptr + first + start + row, mask=exists, other=0).to(tl.int64)
        hidden = tl.load(weighted_ptr + at_rows, mask=exists[None, :] & in_f[:, None], other=0)
        dy = tl.load(dy_ptr + (token * D)[:, None] + d[None, :], mask=exists[:, None] & in_d[None, :], other=0)
        dw = multiply_add(hidden, dy, dw, UPCAST, PRECISION)
        if BIASED:
            if WEIGH_INPUT:
                db += tl.sum(dy.to(ACC), axis=0)
            else:
                weight = tl.load(
                    weight_ptr + tl.load(row_ptr + first + start + row, mask=exists, other=0), mask=exists, other=0
                )
                db += tl.sum(dy.to(ACC) * weight.to(ACC)[:, None], axis=0)
        weighted_ptr += BLOCK_K * F
    at = f[:, None] * D + d[None, :]
    _write(dw_down_ptr + expert * (F * D), at, dw, in_f[:, None] & in_d[None, :], ADD)
    if BIASED and f_tile == 0:
        _write(db_down_ptr, expert * D + d, db, in_d, ADD)


@triton.jit
def w_up_bwd_kernel(
    x_ptr,  # [T, D] bf16
    dgate_ptr,  # [P, F] bf16
    dup_ptr,  # [P, F] bf16
    weight_ptr,  # [R] f32
    token_ptr,  # [P] int
    row_ptr,  # [P] int
    offsets_ptr,  # [E + 1] int64
    dw_gate_ptr,  # [E, D, F] bf16 or f32
    dw_up_ptr,  # [E, D, F] bf16 or f32
    db_gate_ptr,  # [E, F] bf16 or f32
    db_up_ptr,  # [E, F] bf16 or f32
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGH_INPUT: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dW_gate[e] = xᵀ·dgate, dW_up[e] = xᵀ·dup and their column sums, for one [BLOCK_M, BLOCK_N] tile of [D, F]."""
    D_TILES: tl.constexpr = tl.cdiv(D, BLOCK_M)
    F_TILES: tl.constexpr = tl.cdiv(F, BLOCK_N)
    expert = (tl.program_id(0) // (D_TILES * F_TILES)).to(tl.int64)
    d_tile, f_tile = swizzle(tl.program_id(0) % (D_TILES * F_TILES), D_TILES, F_TILES, GROUP)
    d = d_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    f = f_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_d = within(d, D, BLOCK_M)
    in_f = within(f, F, BLOCK_N)
    first = tl.load(offsets_ptr + expert)
    num_rows = (tl.load(offsets_ptr + expert + 1) - first).to(tl.int32)
    dw_gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    dw_up = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    db_gate = tl.zeros([BLOCK_N], dtype=ACC)
    db_up = tl.zeros([BLOCK_N], dtype=ACC)
    row = tl.arange(0, BLOCK_K)
    at_rows = row[:, None] * F + f[None, :]
    dup_ptr += first * F
    if GATED:
        dgate_ptr += first * F
    for start in range(0, num_rows, BLOCK_K):
        exists = start + row < num_rows
        token = tl.load(token_ptr + first + start + row, mask=exists, other=0).to(tl.int64)
        x = tl.load(x_ptr + (token * D)[None, :] + d[:, None], mask=exists[None, :] & in_d[:, None], other=0)
        if WEIGH_INPUT:
            weight = tl.load(
                weight_ptr + tl.load(row_ptr + first + start + row, mask=exists, other=0), mask=exists, other=0
            )
            x = (x.to(ACC) * weight.to(ACC)[None, :]).to(x.dtype)
        in_rows = exists[:, None] & in_f[None, :]
        dup = tl.load(dup_ptr + at_rows, mask=in_rows, other=0)
        dw_up = multiply_add(x, dup, dw_up, UPCAST, PRECISION)
        if BIASED:
            db_up += tl.sum(dup.to(ACC), axis=0)
        if GATED:
            dgate = tl.load(dgate_ptr + at_rows, mask=in_rows, other=0)
            dw_gate = multiply_add(x, dgate, dw_gate, UPCAST, PRECISION)
            if BIASED:
                db_gate += tl.sum(dgate.to(ACC), axis=0)
            dgate_ptr += BLOCK_K * F
        dup_ptr += BLOCK_K * F
    at = d[:, None] * F + f[None, :]
    in_tile = in_d[:, None] & in_f[None, :]
    _write(dw_up_ptr + expert * (D * F), at, dw_up, in_tile, ADD)
    if GATED:
        _write(dw_gate_ptr + expert * (D * F), at, dw_gate, in_tile, ADD)
    if BIASED and d_tile == 0:
        _write(db_up_ptr, expert * F + f, db_up, in_f, ADD)
        if GATED:
            _write(db_gate_ptr, expert * F + f, db_gate, in_f, ADD)


def w_down_bwd(
    weighted_PF: Tensor,
    dy_TD: Tensor,
    weight_R: Tensor,
    plan: RoutingPlan,
    gradients: dict[str, Tensor],
    *,
    weigh_input: bool,
    add: bool = False,
) -> None:
    """Write the gradients of W_down and its bias into `gradients`' tensors, named as in Weights; `add` adds to what is there."""
    E, F, D = gradients["w_down_EFD"].shape
    options = config("w_down_bwd", plan, D=D, F=F, dtype=dy_TD.dtype)
    launch(
        w_down_bwd_kernel,
        (E * cdiv(F, options["BLOCK_M"]) * cdiv(D, options["BLOCK_N"]),),
        weighted_PF,
        dy_TD,
        weight_R,
        plan.token_P,
        plan.row_P,
        plan.offsets_E1,
        gradients["w_down_EFD"],
        gradients.get("b_down_ED"),
        D=D,
        F=F,
        BIASED="b_down_ED" in gradients,
        WEIGH_INPUT=weigh_input,
        ADD=add,
        **numerics(dy_TD),
        **options,
    )


def w_up_bwd(
    x_TD: Tensor,
    dgate_PF: Tensor,
    dup_PF: Tensor,
    weight_R: Tensor,
    plan: RoutingPlan,
    gradients: dict[str, Tensor],
    *,
    weigh_input: bool,
    add: bool = False,
) -> None:
    """Write the gradients of W_gate, W_up and their biases into `gradients`' tensors, likewise."""
    E, D, F = gradients["w_up_EDF"].shape
    options = config("w_up_bwd", plan, D=D, F=F, dtype=x_TD.dtype)
    launch(
        w_up_bwd_kernel,
        (E * cdiv(D, options["BLOCK_M"]) * cdiv(F, options["BLOCK_N"]),),
        x_TD,
        dgate_PF,
        dup_PF,
        weight_R,
        plan.token_P,
        plan.row_P,
        plan.offsets_E1,
        gradients.get("w_gate_EDF"),
        gradients["w_up_EDF"],
        gradients.get("b_gate_EF"),
        gradients.get("b_up_EF"),
        D=D,
        F=F,
        GATED="w_gate_EDF" in gradients,
        BIASED="b_up_EF" in gradients,
        WEIGH_INPUT=weigh_input,
        ADD=add,
        **numerics(x_TD),
        **options,
    )
