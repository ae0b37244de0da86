"""The products in plain torch, for CPUs: one dense product per block row, over gathered tiles; never a masked dense matrix.

The arithmetic is that of the blocks that are there, so 90 % sparsity is about a tenth of the dense product's. Index
arrays are read on the host, which on a CPU costs nothing. `triton_path` has the same two functions for GPUs.
"""

from itertools import pairwise

import torch
from torch import Tensor

from moe_triton.block_sparse.topology import Topology


def sdd(a_MK: Tensor, b_KN: Tensor, topology: Topology, a_row_M: Tensor | None = None) -> Tensor:
    """Blocks of a @ b at a topology, zero outside its bounds; a_row_M: row m of the product is row a_row_M[m] of a."""
    block, K = topology.block, a_MK.shape[1]
    values_NBB = a_MK.new_zeros(topology.num_blocks, block, block)
    a_tiles = tiles(a_MK, topology.row_bounds, block, a_row_M)
    b_tiles = tiles(b_KN.t(), topology.column_bounds, block)
    for row, start, end in _spans(topology.row_offsets):
        right = b_tiles.index_select(0, topology.column_index[start:end]).view(-1, K)
        product = a_tiles[row] @ right.t()
        values_NBB[start:end] = product.view(block, end - start, block).transpose(0, 1)
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
    """s @ dense, or sᵀ @ dense; transpose_out gives the transposed result (contiguous). dense_row_K as in `sdd`."""
    block, columns = topology.block, dense_KN.shape[1]
    if not (topology.uniform_rows and topology.uniform_columns) or any(size % block for size in topology.shape):
        values_NBB = values_NBB.where(inside(topology), 0)
    if transpose:
        offsets, other, bounds = topology.column_offsets, topology.row_index_t, topology.row_bounds
        out_bounds, size = topology.column_bounds, topology.shape[1]
    else:
        offsets, other, bounds = topology.row_offsets, topology.column_index, topology.column_bounds
        out_bounds, size = topology.row_bounds, topology.shape[0]
    dense_tiles = tiles(dense_KN, bounds, block, dense_row_K)
    out_tiles = dense_KN.new_zeros(offsets.shape[0] - 1, block, columns)
    for row, start, end in _spans(offsets):
        if transpose:
            blocks = values_NBB.index_select(0, topology.block_index_t[start:end])
            left = blocks.view(-1, block).t()
        else:
            left = values_NBB[start:end].transpose(0, 1).reshape(block, -1)
        right = dense_tiles.index_select(0, other[start:end]).view(-1, columns)
        torch.mm(left, right, out=out_tiles[row])
    out = out_tiles.flatten(0, 1)
    if out.shape[0] != size:
        out = out[slots(out_bounds, block)[1].flatten()]
    return out.t().contiguous() if transpose_out else out


def tiles(dense_MK: Tensor, bounds: Tensor, block: int, row_M: Tensor | None = None) -> Tensor:
    """Rows of a dense matrix cut at bounds, zeros below short tiles: [tiles, block, K]. row_M [M]: gathered first."""
    num_tiles, (num_rows, K) = bounds.shape[0] - 1, dense_MK.shape
    if row_M is None and num_tiles * block == num_rows:
        return dense_MK.contiguous().view(num_tiles, block, K)  # tiles hold at most `block` rows, so all are full
    if num_rows == 0:
        return dense_MK.new_zeros(num_tiles, block, K)
    slot, valid = slots(bounds, block)
    # a slot of a short tile points past it, at any row: its content is replaced
    slot = slot.flatten().clamp(max=(num_rows if row_M is None else row_M.shape[0]) - 1)
    rows = dense_MK.index_select(0, slot if row_M is None else row_M.index_select(0, slot))
    return rows.view(num_tiles, block, K).where(valid.unsqueeze(2), 0)


def inside(topology: Topology) -> Tensor:
    """Which entries of each block lie within the matrix, bool [num_blocks, block, block]; none of a block without a row."""
    row_valid, column_valid = (slots(b, topology.block)[1] for b in (topology.row_bounds, topology.column_bounds))
    row_valid = torch.cat([row_valid, row_valid.new_zeros(1, topology.block)])
    rows = row_valid.index_select(0, topology.row_index).unsqueeze(2)
    return rows & column_valid.index_select(0, topology.column_index).unsqueeze(1)


def slots(bounds: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Matrix row of each row of each tile [tiles, block], and whether the tile has it."""
    slot = bounds[:-1].unsqueeze(1) + torch.arange(block, dtype=torch.int32, device=bounds.device)
    return slot, slot < bounds[1:].unsqueeze(1)


def _spans(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(block row, its first block, the one past its last) of every block row that has blocks."""
    bounds = offsets.tolist()  # host sync: each block row's product needs its size
    return [(r, s, t) for r, (s, t) in enumerate(pairwise(bounds)) if t > s]
