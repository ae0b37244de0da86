"""The 8-bit product of rows with their expert's weight: e4m3 operands along the contraction, float32 sums, scaled.

With one scale per row the sum is scaled once, at the end. With one scale per 128 elements every block of the sum is scaled
as it is added, which also bounds how many products the matrix unit adds in its own, shorter format (sm_90 keeps about 14
bits); with a scale per row the same bound is asked for by name.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_triton.low_precision.formats import BLOCK, ScaleFormat
from moe_triton.low_precision.quantize import Quantized
from moe_triton.plan import RoutingPlan
from moe_triton.runtime import INTERPRETING, cdiv, launch, target
from moe_triton.targets import nearest
from moe_triton.tiles import rows_of_tile, swizzle, within

# Height of the row tile; then BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages. K of a blocked format divides 128, and so
# does N, so that one scale of the weight meets a tile. Reasons: at 128 rows one accumulator is 128 wide, for a blocked
# format holds a second one beside it; stages fill shared memory (gfx942: 64 KB).
_SETTINGS = {
    "sm_80": {128: (128, 64, 8, 8, 3), 64: (128, 64, 8, 4, 3)},
    "sm_90": {128: (128, 128, 8, 8, 4), 64: (128, 128, 8, 4, 4)},
    "sm_100": {128: (128, 128, 8, 8, 4), 64: (128, 128, 8, 4, 4)},
    "gfx942": {128: (128, 64, 8, 8, 2), 64: (128, 64, 8, 8, 2)},
}


LEAST_HEIGHT = 64
"""Rows of the lowest tile: below, triton multiplies e4m3 in float16 on sm_90 and sm_100. Weights' bytes decide there anyway."""


def settings(height: int, columns: int) -> dict[str, int]:
    """Tile and launch options on the current target for row tiles of this height and outputs of so many columns."""
    if INTERPRETING:
        return {"BLOCK_M": height, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 4}
    names = ("BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")
    options = dict(zip(names, _SETTINGS[nearest(target()).name][height], strict=True))
    if columns % 8:  # an address for each element of the output: 128 columns spill
        options["BLOCK_N"] = 64
    return {"BLOCK_M": height, **options}


@triton.jit
def fp8_rows_kernel(
    a_ptr,  # [rows, K] e4m3
    a_scales_ptr,  # [rows, SCALES] f32
    b_ptr,  # [E, SEGMENTS, N, K] e4m3
    b_scales_ptr,  # [E, SEGMENTS, N or blocks of N, SCALES] f32
    token_ptr,  # [P] int
    offsets_ptr,  # [E + 1] int64
    schedule_ptr,  # [tiles, 2] int32
    out_ptr,  # [P, SEGMENTS · N] bf16
    num_tiles,
    N: tl.constexpr,
    K: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCKED: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = a·bᵀ for one tile of rows of one expert and BLOCK_N rows of one segment of its weight."""
    COLUMNS: tl.constexpr = tl.cdiv(N, BLOCK_N)
    SCALES: tl.constexpr = K // SCALE_BLOCK if BLOCKED else 1
    tile, column = swizzle(tl.program_id(0), num_tiles, SEGMENTS * COLUMNS, GROUP)
    expert, first, exists = rows_of_tile(schedule_ptr, offsets_ptr, tile, BLOCK_M)
    if expert < 0:
        return
    segment = column // COLUMNS
    column = column % COLUMNS
    lane = tl.arange(0, BLOCK_M)
    row = first + lane
    if GATHER:
        row = tl.load(token_ptr + row, mask=exists, other=0).to(tl.int64)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = within(n, N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptr += (row * K)[:, None]
    b_ptr += (expert * SEGMENTS + segment) * (N * K)
    at_b = k[:, None] + n[None, :] * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if BLOCKED:
        b_scales_ptr += (
            (expert * SEGMENTS + segment) * tl.cdiv(N, SCALE_BLOCK) + column * BLOCK_N // SCALE_BLOCK
        ) * SCALES
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + (start + k)[None, :], mask=exists[:, None], other=0.0)
        b = tl.load(b_ptr + at_b, mask=in_n[None, :], other=0.0)
        if BLOCKED:
            block = start // SCALE_BLOCK
            a_scale = tl.load(a_scales_ptr + row * SCALES + block, mask=exists, other=0)
            b_scale = tl.load(b_scales_ptr + block)
            acc += tl.dot(a, b, max_num_imprecise_acc=BLOCK_K) * (a_scale * b_scale)[:, None]
        else:
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=BLOCK_K)
        at_b += BLOCK_K
    if not BLOCKED:
        a_scale = tl.load(a_scales_ptr + row, mask=exists, other=0)
        b_scale = tl.load(b_scales_ptr + (expert * SEGMENTS + segment) * N + n, mask=in_n, other=0)
        acc *= a_scale[:, None] * b_scale[None, :]
    out_ptr += first * (SEGMENTS * N) + segment * N
    tl.store(out_ptr + lane[:, None] * (SEGMENTS * N) + n[None, :], acc, mask=exists[:, None] & in_n[None, :])


def fp8_rows(a: Quantized, b: Quantized, plan: RoutingPlan, form: ScaleFormat, like: Tensor, *, gather: bool) -> Tensor:
    """out_PSN [P, S·N] of like's type: each row of the plan times its expert's weight; a's rows are tokens with `gather`.

    a: values [rows, K]; b: values [E, S, N, K]. Rows that go nowhere are not written.
    """
    P, (_, S, N, K) = plan.token_P.shape[0], b.values.shape
    options = settings(plan.tile_rows, N)
    out = like.new_empty(P, S * N)
    tiles = plan.schedule.shape[0]
    launch(
        fp8_rows_kernel,
        (tiles * S * cdiv(N, options["BLOCK_N"]),),
        *a,
        *b,
        plan.token_P,
        plan.offsets_E1,
        plan.schedule,
        out,
        tiles,
        N=N,
        K=K,
        SEGMENTS=S,
        GATHER=gather,
        BLOCKED=form.blocked,
        SCALE_BLOCK=BLOCK,
        **options,
    )
    return out
