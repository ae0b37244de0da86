"""SwiGLU on the blocks of hidden activations, and its gradient with the rows' weights: one pass each.

Eager torch would read and write every block a dozen times and reduce the weights' gradient with atomics or a sort. Here
the backward program of a row tile walks the tile's blocks, recomputes the hidden values, and sums each row's gradient in
float32 in a fixed order. Blocks without a row are neither read nor written.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_triton.activation import activate, activate_bwd
from moe_triton.block_sparse.topology import Topology
from moe_triton.runtime import launch
from moe_triton.tiles import numerics

COLUMNS = 16
"""Columns of a block that are in registers at a time."""


@triton.jit
def glu_fwd_kernel(
    gate_ptr,  # [num_blocks, BLOCK, BLOCK]
    up_ptr,  # [num_blocks, BLOCK, BLOCK]
    weight_ptr,  # [P] f32
    hidden_ptr,  # [num_blocks, BLOCK, BLOCK]
    row_index_ptr,  # [num_blocks] int32
    row_bounds_ptr,  # [num_tiles + 1] int32
    num_tiles,
    ON_INPUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """hidden = silu(w·gate) · (w·up), with w = 1 unless ON_INPUT."""
    block = tl.program_id(0).to(tl.int64)
    tile = tl.load(row_index_ptr + block)
    if tile < num_tiles:
        m = tl.arange(0, BLOCK)
        if ON_INPUT:
            row = tl.load(row_bounds_ptr + tile) + m
            inside = row < tl.load(row_bounds_ptr + tile + 1)
            weight = tl.load(weight_ptr + row, mask=inside, other=0.0).to(ACC)
        for start in range(0, BLOCK, COLUMNS):
            at = block * (BLOCK * BLOCK) + m[:, None] * BLOCK + start + tl.arange(0, COLUMNS)[None, :]
            gate, up = tl.load(gate_ptr + at).to(ACC), tl.load(up_ptr + at).to(ACC)
            if ON_INPUT:
                gate, up = gate * weight[:, None], up * weight[:, None]
            tl.store(hidden_ptr + at, activate(gate, up, "swiglu", True).to(hidden_ptr.dtype.element_ty))


@triton.jit
def glu_bwd_kernel(
    gate_ptr,  # [num_blocks, BLOCK, BLOCK]
    up_ptr,  # [num_blocks, BLOCK, BLOCK]
    dhidden_ptr,  # [num_blocks, BLOCK, BLOCK], before the rows' weights unless ON_INPUT
    weight_ptr,  # [P] f32
    hidden_ptr,  # [num_blocks, BLOCK, BLOCK], times the rows' weights unless ON_INPUT
    dgate_ptr,  # [num_blocks, BLOCK, BLOCK]
    dup_ptr,  # [num_blocks, BLOCK, BLOCK]
    dweight_ptr,  # [P] f32
    row_offsets_ptr,  # [num_tiles + 1] int32
    row_bounds_ptr,  # [num_tiles + 1] int32
    ON_INPUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """With a = silu(g)·u: dw = <da, a>, dg = w·da·u·silu'(g), du = w·da·silu(g), and w·a for the gradient of W_down.

    ON_INPUT the weight is in g = w·gate and u = w·up: dw = <dg, gate> + <du, up>, and gate and up get w·dg and w·du.
    """
    tile = tl.program_id(0)
    m = tl.arange(0, BLOCK)
    row = tl.load(row_bounds_ptr + tile) + m
    inside = row < tl.load(row_bounds_ptr + tile + 1)
    weight = tl.load(weight_ptr + row, mask=inside, other=0.0).to(ACC)
    dweight = tl.zeros([BLOCK], dtype=ACC)
    dtype = hidden_ptr.dtype.element_ty
    for block in range(tl.load(row_offsets_ptr + tile), tl.load(row_offsets_ptr + tile + 1)):
        row_at = tl.cast(block, tl.int64) * (BLOCK * BLOCK) + m[:, None] * BLOCK
        for start in range(0, BLOCK, COLUMNS):
            at = row_at + start + tl.arange(0, COLUMNS)[None, :]
            gate, up = tl.load(gate_ptr + at).to(ACC), tl.load(up_ptr + at).to(ACC)
            dhidden = tl.load(dhidden_ptr + at).to(ACC)
            if ON_INPUT:
                scaled_gate, scaled_up = gate * weight[:, None], up * weight[:, None]
                hidden, dgate, dup = activate_bwd(  # pyright: ignore[reportGeneralTypeIssues]
                    scaled_gate, scaled_up, dhidden, "swiglu", True
                )
                dweight += tl.sum(dgate * gate + dup * up, axis=1)
            else:
                hidden, dgate, dup = activate_bwd(gate, up, dhidden, "swiglu", True)
                dweight += tl.sum(dhidden * hidden, axis=1)
                hidden *= weight[:, None]
            tl.store(hidden_ptr + at, hidden.to(dtype))
            tl.store(dgate_ptr + at, (dgate * weight[:, None]).to(dtype))
            tl.store(dup_ptr + at, (dup * weight[:, None]).to(dtype))
    tl.store(dweight_ptr + row, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)


def forward(gate_NBB: Tensor, up_NBB: Tensor, weight_P: Tensor, topology: Topology, *, on_input: bool) -> Tensor:
    """Hidden values of the blocks; those of blocks without a row are not written."""
    hidden_NBB = gate_NBB.new_empty(gate_NBB.shape)
    launch(
        glu_fwd_kernel,
        (topology.num_blocks,),
        gate_NBB,
        up_NBB,
        weight_P,
        hidden_NBB,
        topology.row_index,
        topology.row_bounds,
        topology.num_block_rows,
        ON_INPUT=on_input,
        ACC=numerics(gate_NBB)["ACC"],
        BLOCK=topology.block,
        COLUMNS=COLUMNS,
    )
    return hidden_NBB


def backward(
    gate_NBB: Tensor, up_NBB: Tensor, dhidden_NBB: Tensor, weight_P: Tensor, topology: Topology, *, on_input: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden for dW_down, dgate, dup, dweight_P); blocks without a row are not written."""
    hidden_NBB, dgate_NBB, dup_NBB = (gate_NBB.new_empty(gate_NBB.shape) for _ in range(3))
    dweight_P = weight_P.new_empty(weight_P.shape)
    launch(
        glu_bwd_kernel,
        (topology.num_block_rows,),
        gate_NBB,
        up_NBB,
        dhidden_NBB,
        weight_P,
        hidden_NBB,
        dgate_NBB,
        dup_NBB,
        dweight_P,
        topology.row_offsets,
        topology.row_bounds,
        ON_INPUT=on_input,
        ACC=numerics(gate_NBB)["ACC"],
        BLOCK=topology.block,
        COLUMNS=COLUMNS,
    )
    return hidden_NBB, dgate_NBB, dup_NBB, dweight_P
