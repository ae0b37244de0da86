"""Second product of the expert FFN: hidden rows times W_down, into contiguous rows.

Rows are written once, in expert order and unweighted; the weighted sum per token is a kernel of its own (combine.py),
because scattering from the epilogue costs more than the second pass over the rows. Keeps nothing for backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_triton.plan import RoutingPlan
from moe_triton.runtime import cdiv, launch
from moe_triton.tiles import (
    Weights,
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
def down_fwd_kernel(
    hidden_ptr,  # [P, F] bf16, with TMA its descriptor
    w_down_ptr,  # [E, F, D] bf16, likewise
    b_down_ptr,  # [E, D] bf16
    offsets_ptr,  # [E + 1] int64
    schedule_ptr,  # [tiles, 2] int32
    out_ptr,  # [P, D] bf16
    num_tiles,
    D: tl.constexpr,
    F: tl.constexpr,
    BIASED: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """out = hidden·W_down (+ b_down) for one tile of rows of one expert and BLOCK_N columns; TMA as in up_fwd_kernel."""
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
            at_w = f[:, None] * D + d[None, :]
            out = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
            for start in range(0, F, BLOCK_K):
                if TMA:  # rows past the expert's end are another's: computed, and not stored
                    hidden = hidden_ptr.load([first.to(tl.int32), start])
                    w = w_down_ptr.load([expert.to(tl.int32), start, column * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
                else:
                    in_f = within(start + f, F, BLOCK_K)
                    at_rows = hidden_ptr + first * F + row[:, None] * F + (start + f)[None, :]
                    hidden = tl.load(at_rows, mask=exists[:, None] & in_f[None, :], other=0)
                    in_w = in_f[:, None] & in_d[None, :]
                    w = tl.load(w_down_ptr + expert * (F * D) + at_w, mask=in_w, other=0)
                out = multiply_add(hidden, w, out, UPCAST, PRECISION)
                at_w += BLOCK_K * D
            if BIASED:
                out += tl.load(b_down_ptr + expert * D + d, mask=in_d, other=0).to(ACC)[None, :]
            at = out_ptr + first * D + row[:, None] * D + d[None, :]
            tl.store(at, out, mask=exists[:, None] & in_d[None, :])


def down(hidden_PF: Tensor, weights: Weights, plan: RoutingPlan) -> Tensor:
    """out_PD [P, D]: each row's expert output, unweighted. Rows that go nowhere are not written."""
    P, F = hidden_PF.shape
    D = weights.w_down_EFD.shape[2]
    out_PD = hidden_PF.new_empty(P, D)
    described = (hidden_PF, weights.w_down_EFD)
    options = config("down", plan, D=D, F=F, dtype=hidden_PF.dtype, described=described)
    M, N, K, tma = (options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TMA"))
    tiles = plan.schedule.shape[0]
    launch(
        down_fwd_kernel,
        (num_programs(tiles * cdiv(D, N), tma),),
        operand(hidden_PF, (M, K), tma),
        operand(weights.w_down_EFD, (1, K, N), tma),
        weights.b_down_ED,
        plan.offsets_E1,
        plan.schedule,
        out_PD,
        tiles,
        D=D,
        F=F,
        BIASED=weights.b_down_ED is not None,
        **numerics(hidden_PF),
        **options,
    )
    return out_PD
