"""The segmented sum that brings rows home: y_t = Σ over the rows of token t of weight · row.

Eager torch's index_add is either atomic, so not repeatable, or a sort; and its autograd keeps the rows. Here each token
sums its own rows, found through `reverse_R`, in the routing's order: repeatable, any number of rows per token, no zero fill.
The backward of the gather of x is the same sum without weights, over the rows of dX.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_triton.plan import RoutingPlan
from moe_triton.runtime import INTERPRETING, cdiv, launch, next_power_of_two
from moe_triton.tiles import numerics, within


@triton.jit
def combine_fwd_kernel(
    rows_ptr,  # [P, D] bf16
    weight_ptr,  # [R] f32
    reverse_ptr,  # [R] int
    token_offsets_ptr,  # [T + 1] int
    num_computed_ptr,  # [] int64
    out_ptr,  # [T, D] bf16
    num_tokens,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the rows of BLOCK_T tokens over BLOCK_N columns; places past the computed rows were never written and are skipped."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = token < num_tokens
    d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_d = within(d, D, BLOCK_N)
    first = tl.load(token_offsets_ptr + token, mask=in_t, other=0)
    end = tl.load(token_offsets_ptr + token + 1, mask=in_t, other=0)
    num_computed = tl.load(num_computed_ptr)
    total = tl.zeros([BLOCK_T, BLOCK_N], dtype=ACC)
    for i in range(0, tl.max(end - first, axis=0).to(tl.int32)):
        exists = first + i < end
        place = tl.load(reverse_ptr + first + i, mask=exists, other=0).to(tl.int64)
        computed = exists & (place < num_computed)
        value = tl.load(rows_ptr + place[:, None] * D + d[None, :], mask=computed[:, None] & in_d[None, :], other=0)
        value = value.to(ACC)
        if WEIGHTED:
            value *= tl.load(weight_ptr + first + i, mask=computed, other=0).to(ACC)[:, None]
        total += value
    tl.store(out_ptr + token[:, None] * D + d[None, :], total, mask=in_t[:, None] & in_d[None, :])


def _config(D: int, num_tokens: int) -> dict[str, int]:
    if INTERPRETING:  # small, so that small tests meet several programs
        return {"BLOCK_T": 16 if num_tokens <= 512 else 256, "BLOCK_N": 64}
    columns = min(next_power_of_two(D), 1024)
    return {"BLOCK_T": max(2048 // columns, 1), "BLOCK_N": columns, "num_warps": 4}


def combine(rows_PD: Tensor, weight_R: Tensor | None, plan: RoutingPlan) -> Tensor:
    """y_TD [T, D], the (weighted) sum of every token's rows, accumulated in float32; zero for a token without rows."""
    D, T = rows_PD.shape[1], plan.token_offsets.shape[0] - 1
    y_TD = rows_PD.new_empty(T, D)
    config = _config(D, T)
    launch(
        combine_fwd_kernel,
        (cdiv(T, config["BLOCK_T"]), cdiv(D, config["BLOCK_N"])),
        rows_PD,
        weight_R,
        plan.reverse_R,
        plan.token_offsets,
        plan.offsets_E1[-1:],
        y_TD,
        T,
        D=D,
        WEIGHTED=weight_R is not None,
        ACC=numerics(rows_PD)["ACC"],
        **config,
    )
    return y_TD
