"""The products as Triton kernels: two of them, since a @ s = (sᵀ @ aᵀ)ᵀ and strides transpose for nothing.

Eager torch would need a masked dense product. `sdd_kernel` runs one program per block that is there; `dsd_kernel` one per
tile of the dense result, which walks its block row (or, through the transposed index, its block column) in order: float32
sums in a fixed order, no atomics. Either can gather the rows of its dense operand, so that tokens need no copy in expert
order. Nothing is saved here; `products` has the gradients, which are the same two kernels.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moe_triton import tuning
from moe_triton.block_sparse.topology import Topology
from moe_triton.runtime import cdiv, launch, target
from moe_triton.tiles import multiply_add, numerics, swizzle


@triton.jit
def _bounds(tile, bounds_ptr, size, BLOCK: tl.constexpr, UNIFORM: tl.constexpr):
    """First matrix row of a tile, and the row that it ends before. A uniform tile ends with the matrix at the latest."""
    if UNIFORM:
        start = tile * BLOCK
        end = size
    else:
        start = tl.load(bounds_ptr + tile)
        end = tl.load(bounds_ptr + tile + 1)
    return start, end


@triton.jit
def sdd_kernel(
    a_ptr,  # [M, K], or any number of rows with GATHER
    b_ptr,  # [K, N]
    values_ptr,  # [num_blocks, BLOCK_M, BLOCK_M]
    row_index_ptr,  # [num_blocks] int32
    column_index_ptr,  # [num_blocks] int32
    row_bounds_ptr,  # [num_block_rows + 1] int32
    column_bounds_ptr,  # [num_block_columns + 1] int32
    a_row_ptr,  # [M] int
    M,
    N,
    K,
    num_block_rows,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIFORM_ROWS: tl.constexpr,
    UNIFORM_COLUMNS: tl.constexpr,
    GATHER: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """values[i] = rows of block i of a @ columns of block i of b; zeros where the block is outside, or has no row."""
    block = tl.program_id(0)
    row = tl.load(row_index_ptr + block)
    column = tl.load(column_index_ptr + block)
    used = row < num_block_rows
    m_start, m_end = _bounds(tl.minimum(row, num_block_rows - 1), row_bounds_ptr, M, BLOCK_M, UNIFORM_ROWS)  # pyright: ignore[reportGeneralTypeIssues]
    n_start, n_end = _bounds(column, column_bounds_ptr, N, BLOCK_M, UNIFORM_COLUMNS)  # pyright: ignore[reportGeneralTypeIssues]
    lane = tl.arange(0, BLOCK_M)
    m, n, k = m_start + lane, n_start + lane, tl.arange(0, BLOCK_K)
    m_inside, n_inside = (m < m_end) & used, n < n_end
    if GATHER:
        m = tl.load(a_row_ptr + m, mask=m_inside, other=0)
    a_at = a_ptr + m.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
    b_at = b_ptr + k[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
    total = tl.zeros([BLOCK_M, BLOCK_M], dtype=ACC)
    # unused blocks, of which a topology from routing may have many, skip the products
    for start in range(0, tl.where(used, K, 0), BLOCK_K):
        k_inside = k < K - start
        a = tl.load(a_at, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
        b = tl.load(b_at, mask=k_inside[:, None] & n_inside[None, :], other=0.0)
        total = multiply_add(a, b, total, UPCAST, PRECISION)
        a_at += BLOCK_K * stride_ak
        b_at += BLOCK_K * stride_bk
    values_at = values_ptr + block.to(tl.int64) * (BLOCK_M * BLOCK_M) + lane[:, None] * BLOCK_M + lane[None, :]
    tl.store(values_at, total.to(values_ptr.dtype.element_ty))


@triton.jit
def dsd_kernel(
    values_ptr,  # [num_blocks, BLOCK_M, BLOCK_M]
    dense_ptr,  # [K, N], or any number of rows with GATHER
    out_ptr,  # [M, N]
    offsets_ptr,  # [tiles of M + 1] int32
    other_index_ptr,  # [num_blocks] int32: tile of K of each block
    block_index_ptr,  # [num_blocks] int32: with TRANSPOSE, where in values
    out_bounds_ptr,  # [tiles of M + 1] int32
    dense_bounds_ptr,  # [tiles of K + 1] int32
    dense_row_ptr,  # [K] int
    M,
    N,
    K,
    num_tiles,
    stride_dk,
    stride_dn,
    stride_om,
    stride_on,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    UNIFORM_OUT: tl.constexpr,
    UNIFORM_DENSE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    GATHER: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = s @ dense, or sᵀ @ dense with TRANSPOSE: M, K are then the columns and rows of s. Writes every row of out."""
    tile, tile_n = swizzle(tl.program_id(0), num_tiles, tl.cdiv(N, BLOCK_N), GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_start, m_end = _bounds(tile, out_bounds_ptr, M, BLOCK_M, UNIFORM_OUT)  # pyright: ignore[reportGeneralTypeIssues]
    m_in = tl.arange(0, BLOCK_M)
    m = m_start + m_in
    m_inside, n_inside = m < m_end, n < N
    dense_columns = dense_ptr + n.to(tl.int64)[None, :] * stride_dn

    STEPS: tl.constexpr = BLOCK_M // BLOCK_K
    first, last = tl.load(offsets_ptr + tile), tl.load(offsets_ptr + tile + 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for step in range(first * STEPS, last * STEPS):
        place = step // STEPS
        k_in = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        k_start, k_end = _bounds(tl.load(other_index_ptr + place), dense_bounds_ptr, K, BLOCK_M, UNIFORM_DENSE)
        k = k_start + k_in
        k_inside = k < k_end
        if TRANSPOSE:
            block = tl.load(block_index_ptr + place).to(tl.int64)
            s_at = k_in[None, :] * BLOCK_M + m_in[:, None]
        else:
            block = tl.cast(place, tl.int64)
            s_at = m_in[:, None] * BLOCK_M + k_in[None, :]
        s_at = values_ptr + block * (BLOCK_M * BLOCK_M) + s_at
        s = tl.load(s_at, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
        if GATHER:
            k = tl.load(dense_row_ptr + k, mask=k_inside, other=0)
        dense_at = dense_columns + k.to(tl.int64)[:, None] * stride_dk
        dense = tl.load(dense_at, mask=k_inside[:, None] & n_inside[None, :], other=0.0)
        total = multiply_add(s, dense, total, UPCAST, PRECISION)
    out_at = out_ptr + m.to(tl.int64)[:, None] * stride_om + n.to(tl.int64)[None, :] * stride_on
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])


def sdd(a_MK: Tensor, b_KN: Tensor, topology: Topology, a_row_M: Tensor | None = None) -> Tensor:
    """As `torch_path.sdd`; operands may have any strides."""
    block = topology.block
    values_NBB = a_MK.new_empty(topology.num_blocks, block, block)
    ragged = not topology.uniform_columns
    options = _options("sdd", block, block, (a_MK, b_KN), ragged)
    launch(
        sdd_kernel,
        (topology.num_blocks,),
        a_MK,
        b_KN,
        values_NBB,
        topology.row_index,
        topology.column_index,
        topology.row_bounds,
        topology.column_bounds,
        topology.row_bounds if a_row_M is None else a_row_M,
        *topology.shape,
        a_MK.shape[1],
        topology.num_block_rows,
        *a_MK.stride(),
        *b_KN.stride(),
        UNIFORM_ROWS=topology.uniform_rows,
        UNIFORM_COLUMNS=topology.uniform_columns,
        GATHER=a_row_M is not None,
        **numerics(a_MK),
        **options,
    )
    return values_NBB


def dsd(
    values_NBB: Tensor,
    dense_KN: Tensor,
    topology: Topology,
    *,
    transpose: bool,
    transpose_out: bool,
    dense_row_K: Tensor | None = None,
) -> Tensor:
    """As `torch_path.dsd`; the dense operand may have any strides."""
    M, K = reversed(topology.shape) if transpose else topology.shape
    N = dense_KN.shape[1]
    out = dense_KN.new_empty((N, M) if transpose_out else (M, N))
    out_MN = out.t() if transpose_out else out
    if transpose:
        offsets, other_index = topology.column_offsets, topology.row_index_t
        out_bounds, dense_bounds = topology.column_bounds, topology.row_bounds
        uniform_out, uniform_dense = topology.uniform_columns, topology.uniform_rows
    else:
        offsets, other_index = topology.row_offsets, topology.column_index
        out_bounds, dense_bounds = topology.row_bounds, topology.column_bounds
        uniform_out, uniform_dense = topology.uniform_rows, topology.uniform_columns
    num_tiles = offsets.shape[0] - 1
    options = _options("dsd", topology.block, N, (dense_KN, out_MN), not topology.uniform_columns)
    launch(
        dsd_kernel,
        (num_tiles * cdiv(N, options["BLOCK_N"]),),
        values_NBB,
        dense_KN,
        out,
        offsets,
        other_index,
        topology.block_index_t,
        out_bounds,
        dense_bounds,
        out_bounds if dense_row_K is None else dense_row_K,
        M,
        N,
        K,
        num_tiles,
        *dense_KN.stride(),
        *out_MN.stride(),
        UNIFORM_OUT=uniform_out,
        UNIFORM_DENSE=uniform_dense,
        TRANSPOSE=transpose,
        GATHER=dense_row_K is not None,
        **numerics(values_NBB),
        **options,
    )
    return out


def _options(op: str, block: int, columns: int, dense: Sequence[Tensor], ragged: bool) -> dict[str, int]:
    """Tile and launch options from the tuning table.

    dense: operands and result of any strides. Where these or ragged tiles forbid vector loads, each element needs its own
    address in registers, so steps are shallower.
    """
    aligned = not ragged and all(stride == 1 or stride % 16 == 0 for tensor in dense for stride in tensor.stride())
    where = {"aligned": aligned, "dtype": dense[0].dtype, "target": target()}
    return tuning.pick_block(op, block=block, columns=columns, **where)
