"""What the block-sparse operators mean, in plain torch: masked dense products, and a loop over experts of unequal width.

Computed in float32 (float64 stays float64) with ordinary autograd and cast back. For tests and for reading: the masked
products do the work of dense ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_triton.block_sparse.topology import Topology


def to_dense(values_NBB: Tensor, topology: Topology) -> Tensor:
    """The whole matrix, zeros where no block is; block by block."""
    dense_MN = values_NBB.new_zeros(topology.shape)
    row_bounds, column_bounds = topology.row_bounds.tolist(), topology.column_bounds.tolist()  # host sync: a reference
    for i, (row, column) in enumerate(zip(topology.row_index.tolist(), topology.column_index.tolist(), strict=True)):
        if row < topology.num_block_rows:
            top, bottom = row_bounds[row : row + 2]
            left, right = column_bounds[column : column + 2]
            dense_MN[top:bottom, left:right] = values_NBB[i, : bottom - top, : right - left]
    return dense_MN


def to_values(dense_MN: Tensor, topology: Topology) -> Tensor:
    """The blocks of a dense matrix at a topology, zeros outside the matrix; the inverse of `to_dense` there."""
    values_NBB = dense_MN.new_zeros(topology.num_blocks, topology.block, topology.block)
    row_bounds, column_bounds = topology.row_bounds.tolist(), topology.column_bounds.tolist()  # host sync: a reference
    for i, (row, column) in enumerate(zip(topology.row_index.tolist(), topology.column_index.tolist(), strict=True)):
        if row < topology.num_block_rows:
            top, bottom = row_bounds[row : row + 2]
            left, right = column_bounds[column : column + 2]
            values_NBB[i, : bottom - top, : right - left] = dense_MN[top:bottom, left:right]
    return values_NBB


def sdd(a_MK: Tensor, b_KN: Tensor, topology: Topology) -> Tensor:
    """Values of a @ b at a topology."""
    return to_values(_wide(a_MK) @ _wide(b_KN), topology).to(a_MK.dtype)


def dsd(values_NBB: Tensor, topology: Topology, dense_KN: Tensor, *, transpose: bool = False) -> Tensor:
    """s @ dense, or sᵀ @ dense."""
    s = to_dense(_wide(values_NBB), topology)
    return ((s.t() if transpose else s) @ _wide(dense_KN)).to(dense_KN.dtype)


def dds(dense_MK: Tensor, values_NBB: Tensor, topology: Topology, *, transpose: bool = False) -> Tensor:
    """dense @ s, or dense @ sᵀ."""
    s = to_dense(_wide(values_NBB), topology)
    return (_wide(dense_MK) @ (s.t() if transpose else s)).to(dense_MK.dtype)


def variable_width_ffn(
    x_TD: Tensor,
    w_gate_DF: Tensor,
    w_up_DF: Tensor,
    w_down_FD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    widths: Sequence[int],
    *,
    weight_on: str = "output",
    hidden_of: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: torch.nn.functional.silu(gate) * up,
) -> Tensor:
    """`moe_triton.reference.expert_ffn` for experts of unequal width, whose hidden columns lie side by side along F.

    hidden_of: hidden values from both pre-activations; SwiGLU is the only one that kernels have.
    """
    x, w_gate, w_up, w_down, weight = (_wide(t) for t in (x_TD, w_gate_DF, w_up_DF, w_down_FD, weight_P))
    y_TD = torch.zeros_like(x)
    bounds = offsets_E1.tolist()  # host sync: the reference loops over experts
    left = 0
    for start, end, width in zip(bounds[:-1], bounds[1:], widths, strict=True):
        token, scale = token_P[start:end], weight[start:end].unsqueeze(1)
        columns = slice(left, left + width)
        left += width
        rows = x.index_select(0, token)
        if weight_on == "input":
            rows = rows * scale
        hidden = hidden_of(rows @ w_gate[:, columns], rows @ w_up[:, columns])
        out = hidden @ w_down[columns]
        y_TD = y_TD.index_add(0, token, out if weight_on == "input" else out * scale)
    return y_TD.to(x_TD.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
