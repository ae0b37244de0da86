"""The two kernels behind the four forms: groups of rows (2d×3d, and 3d×2d transposed), and sums (2d×2d, 3d×3d).

A program of `grouped_rows_kernel` finds its group by a scan over the ends, so there is one launch and no schedule; rows that
belong to no group are zeros from the same store. A program of `grouped_inner_kernel` owns a tile of one group's result and
walks over that group's part of the sum, so an empty group gets its zeros without a fill. Any strides, nothing padded.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_triton.grouped import settings
from moe_triton.plan import max_tiles
from moe_triton.runtime import cdiv, launch, next_power_of_two, target
from moe_triton.tiles import multiply_add, numerics, swizzle
from moe_triton.tuning import tile_height


@triton.jit
def _lanes(SIZE: tl.constexpr, WIDE: tl.constexpr):
    """0 .. SIZE-1; in 64 bits where a stride is so large that offsets within one tile need them."""
    lane = tl.arange(0, SIZE)
    if WIDE:
        lane = lane.to(tl.int64)
    return lane


@triton.jit
def _end(ends_ptr, group, size, mask):
    """The end of a group, within [0, size]; 0 where masked."""
    end = tl.load(ends_ptr + group, mask=mask, other=0)
    return tl.minimum(tl.maximum(end, 0), size).to(tl.int32)


@triton.jit
def _rows_of_tile(ends_ptr, tile, num_rows, num_groups, BINS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group's rows); group num_groups has the rows past the last end, and more are none."""
    group = tl.arange(0, BINS)
    start = _end(ends_ptr, group - 1, num_rows, (group > 0) & (group <= num_groups))
    end = _end(ends_ptr, group, num_rows, group < num_groups)
    end = tl.where(group == num_groups, num_rows, end)
    tiles = tl.where(group <= num_groups, (tl.maximum(end - start, 0) + BLOCK_M - 1) // BLOCK_M, 0)
    after = tl.cumsum(tiles, axis=0)
    mine = (after > tile) & (after - tiles <= tile)
    first = tl.sum(tl.where(mine, start + (tile - (after - tiles)) * BLOCK_M, 0), axis=0)
    found = tl.sum(tl.where(after <= tile, 1, 0), axis=0)
    return found, first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    depth,
    exists,
    in_n,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a·b over `depth`, for the tile that begins at a_ptr and b_ptr."""
    k = _lanes(BLOCK_K, WIDE)
    at_a = _lanes(BLOCK_M, WIDE)[:, None] * stride_am + k[None, :] * stride_ak
    at_b = k[:, None] * stride_bk + _lanes(BLOCK_N, WIDE)[None, :] * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, depth, BLOCK_K):
        in_k = start + tl.arange(0, BLOCK_K) < depth
        a = tl.load(a_ptr + at_a, mask=exists[:, None] & in_k[None, :], other=0)
        b = tl.load(b_ptr + at_b, mask=in_k[:, None] & in_n[None, :], other=0)
        acc = multiply_add(a, b, acc, UPCAST, PRECISION)
        a_ptr += tl.cast(stride_ak, tl.int64) * BLOCK_K
        b_ptr += tl.cast(stride_bk, tl.int64) * BLOCK_K
    return acc


@triton.jit
def grouped_rows_kernel(
    a_ptr,  # [M, K] bf16
    b_ptr,  # [G, K, N] bf16
    ends_ptr,  # [G] int
    out_ptr,  # [M, N] bf16 or f32
    M,
    N,
    K,
    num_groups,
    num_tiles,
    stride_am,
    stride_ak,
    stride_bg,
    stride_bk,
    stride_bn,
    stride_om,
    stride_on,
    BINS: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[rows of g] = a[rows of g] @ b[g] for one tile of rows of one group and BLOCK_N columns; zeros past the last end."""
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    group, first, end = _rows_of_tile(ends_ptr, tile, M, num_groups, BINS, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues]
    if group > num_groups:
        return
    row = _lanes(BLOCK_M, WIDE)
    n = _lanes(BLOCK_N, WIDE)
    exists = first + row < end
    in_n = column * BLOCK_N + n < N
    out_ptr += first.to(tl.int64) * stride_om + (column * BLOCK_N).to(tl.int64) * stride_on
    at_out = row[:, None] * stride_om + n[None, :] * stride_on
    in_out = exists[:, None] & in_n[None, :]
    if group == num_groups:
        tl.store(out_ptr + at_out, tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC), mask=in_out)
        return
    a_ptr += first.to(tl.int64) * stride_am
    b_ptr += group.to(tl.int64) * stride_bg + (column * BLOCK_N).to(tl.int64) * stride_bn
    acc = _product(
        a_ptr,
        b_ptr,
        K,
        exists,
        in_n,
        stride_am,
        stride_ak,
        stride_bk,
        stride_bn,
        WIDE,
        ACC,
        UPCAST,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    tl.store(out_ptr + at_out, acc, mask=in_out)


@triton.jit
def grouped_inner_kernel(
    a_ptr,  # [M, K], or [G, M, K], bf16
    b_ptr,  # [K, N], or [G, K, N], bf16
    ends_ptr,  # [G] int
    out_ptr,  # [G, M, N] bf16 or f32
    M,
    N,
    K,
    stride_ag,
    stride_am,
    stride_ak,
    stride_bg,
    stride_bk,
    stride_bn,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[g] = a[:, part of g] @ b[part of g], or a[g] @ b[g], for one tile of one group's result."""
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (m_tiles * n_tiles)
    m_tile, n_tile = swizzle(tl.program_id(0) % (m_tiles * n_tiles), m_tiles, n_tiles, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    row = _lanes(BLOCK_M, WIDE)
    n = _lanes(BLOCK_N, WIDE)
    in_m = m_tile * BLOCK_M + row < M
    in_n = n_tile * BLOCK_N + n < N
    a_ptr += (m_tile * BLOCK_M).to(tl.int64) * stride_am
    b_ptr += (n_tile * BLOCK_N).to(tl.int64) * stride_bn
    if RAGGED:
        first = _end(ends_ptr, group - 1, K, group > 0)
        depth = _end(ends_ptr, group, K, True) - first
        a_ptr += first.to(tl.int64) * stride_ak
        b_ptr += first.to(tl.int64) * stride_bk
    else:
        depth = K
        a_ptr += group.to(tl.int64) * stride_ag
        b_ptr += group.to(tl.int64) * stride_bg
    acc = _product(
        a_ptr,
        b_ptr,
        depth,
        in_m,
        in_n,
        stride_am,
        stride_ak,
        stride_bk,
        stride_bn,
        WIDE,
        ACC,
        UPCAST,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    out_ptr += group.to(tl.int64) * M * N + (m_tile * BLOCK_M).to(tl.int64) * N + n_tile * BLOCK_N
    at_out = row.to(tl.int64)[:, None] * N + n[None, :] if WIDE else row[:, None] * N + n[None, :]
    tl.store(out_ptr + at_out, acc, mask=in_m[:, None] & in_n[None, :])


def grouped_rows(a_MK: Tensor, b_GKN: Tensor, ends_G: Tensor, out_MN: Tensor) -> None:
    """Write a's rows, each group's times that group's matrix, into out; zeros for rows past the last end. Any strides."""
    (M, K), (G, _, N) = a_MK.shape, b_GKN.shape
    height = tile_height(M / max(G, 1), target())
    aligned = _wide_loads(a_MK, ragged=0) and _wide_loads(b_GKN)
    # storing a tile across the layout of its accumulator takes registers, so a transposed output has narrow tiles
    columns = N if out_MN.stride(1) == 1 else 0
    options = settings.pick(
        "rows", height=height, columns=columns, aligned=aligned, itemsize=a_MK.element_size(), target=target()
    )
    tiles = max_tiles(M, G + 1, options["BLOCK_M"])
    launch(
        grouped_rows_kernel,
        (tiles * cdiv(N, options["BLOCK_N"]),),
        a_MK,
        b_GKN,
        ends_G,
        out_MN,
        M,
        N,
        K,
        G,
        tiles,
        *a_MK.stride(),
        *b_GKN.stride(),
        *out_MN.stride(),
        BINS=max(next_power_of_two(G + 1), 2),
        **_numerics(a_MK, b_GKN, out_MN),
        **options,
    )


def grouped_inner(a: Tensor, b: Tensor, ends_G: Tensor | None, out_GMN: Tensor) -> None:
    """Write each group's product into out, contiguous: of its part of the sum with ends, of its matrices without."""
    G, M, N = out_GMN.shape
    ragged = ends_G is not None
    height = min(max(next_power_of_two(M), 16), 128)
    aligned = _wide_loads(a, ragged=1 if ragged else None) and _wide_loads(b, ragged=0 if ragged else None)
    options = settings.pick(
        "inner", height=height, columns=N, aligned=aligned, itemsize=a.element_size(), target=target()
    )
    tiles = cdiv(M, options["BLOCK_M"]) * cdiv(N, options["BLOCK_N"])
    launch(
        grouped_inner_kernel,
        (G * tiles,),
        a,
        b,
        ends_G,
        out_GMN,
        M,
        N,
        a.shape[-1],
        *_with_group(a),
        *_with_group(b),
        RAGGED=ragged,
        **_numerics(a, b, out_GMN),
        **options,
    )


def _with_group(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.dim() == 3 else (0, *tensor.stride())


def _numerics(a: Tensor, b: Tensor, out: Tensor) -> dict[str, Any]:
    # offsets within a tile of at most 256 lanes in each of two dimensions must stay below 2^31
    largest = max(abs(stride) for tensor in (a, b, out) for stride in tensor.stride()[-2:])
    return {"WIDE": largest >= 1 << 22, **numerics(a)}


def _wide_loads(tensor: Tensor, ragged: int | None = None) -> bool:
    """Whether 16 bytes at a time can be read along one of the last two dimensions, which is not the ragged one."""
    step = 16 // tensor.element_size()
    strides, last = tensor.stride(), tensor.dim() - 1
    for unit in (last, last - 1):
        if strides[unit] == 1 and unit != ragged and tensor.shape[unit] % step == 0:
            others = [stride for i, stride in enumerate(strides) if i != unit]
            return tensor.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in others)
    return False
