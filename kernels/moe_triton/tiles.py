"""What the grouped products share: an expert's weights, finding a program's tile on the device, one multiply-add."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton import tuning
from moe_triton.plan import RoutingPlan
from moe_triton.runtime import dot_precision, multiprocessors, must_upcast, target


class Weights(NamedTuple):
    """The experts' parameters, contiguous, all of one type; no gate for an activation without one, biases optional."""

    w_gate_EDF: Tensor | None
    w_up_EDF: Tensor
    w_down_EFD: Tensor
    b_gate_EF: Tensor | None = None
    b_up_EF: Tensor | None = None
    b_down_ED: Tensor | None = None


def numerics(x: Tensor) -> dict[str, Any]:
    """Compile-time values that follow from a product's type: accumulator, and how tl.dot takes its operands."""
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return {"ACC": acc, "UPCAST": must_upcast(x), "PRECISION": dot_precision(x)}


def config(
    op: str, plan: RoutingPlan, *, D: int, F: int, dtype: torch.dtype, described: tuple[Tensor | None, ...] = ()
) -> dict[str, int]:
    """Tile sizes and launch options of one of the six products, from the tuning table.

    described: the operands of an operator that has a variant with descriptors; where one of them forbids it, the plain
    variant is taken.
    """
    share = plan.token_P.shape[0] / max(plan.offsets_E1.shape[0] - 1, 1)
    sizes = {"rows_per_expert": share, "D": D, "F": F, "dtype": dtype}
    tma = all(operand is None or can_describe(operand) for operand in described)
    return tuning.pick(op, **sizes, target=target(), tile_rows=plan.tile_rows, tma=tma)


def can_describe(tensor: Tensor) -> bool:
    """Whether the hardware can copy boxes of a contiguous tensor: it starts, and each of its rows, at a multiple of 16 bytes."""
    row_bytes = tensor.shape[-1] * tensor.dtype.itemsize
    return tensor.numel() > 0 and tensor.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def operand(tensor: Tensor | None, block: tuple[int, ...], tma: int) -> Any:
    """What a kernel gets for a contiguous tensor: itself, or with `tma` a descriptor of boxes as large as `block`."""
    if tensor is None or not tma:
        return tensor
    return TensorDescriptor.from_tensor(tensor, list(block))


def num_programs(tiles: int, tma: int) -> int:
    """Programs to launch for a number of tiles: one for each, or one for each multiprocessor that then walks over several."""
    return min(tiles, multiprocessors()) if tma else tiles


@triton.jit
def swizzle(program, num_rows, num_columns, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles share a sweep over the columns, so that their weights stay in L2."""
    group = program // (GROUP * num_columns)
    height = tl.minimum(num_rows - group * GROUP, GROUP)
    within = program % (GROUP * num_columns)
    return group * GROUP + within % height, within // height


@triton.jit
def rows_of_tile(schedule_ptr, offsets_ptr, tile, BLOCK_M: tl.constexpr):
    """(expert, first row, which rows of the tile exist); the expert is -1 past the last tile.

    Both are in 64 bits, to be multiplied by a row's or an expert's size; what stays within a tile or an expert's weight is in
    32, because a tile of 64-bit offsets would take all registers.
    """
    expert = tl.load(schedule_ptr + 2 * tile).to(tl.int64)
    first = tl.load(schedule_ptr + 2 * tile + 1).to(tl.int64)
    return expert, first, first + tl.arange(0, BLOCK_M) < tl.load(offsets_ptr + expert + 1)


@triton.jit
def multiply_add(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a·b; UPCAST makes the operands float32 first, for the interpreter's bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """index < SIZE, known to be true where the blocks of a loop or grid divide SIZE."""
    if SIZE % BLOCK == 0:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < SIZE


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    left_right = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(left_right, (0, 2, 1)))


@triton.jit
def column_slices(tile, SLICES: tl.constexpr):
    """1, 2 or 4 slices of a tile's columns: an epilogue over a whole accumulator at once does not fit into registers."""
    if SLICES == 1:
        return (tile,)
    elif SLICES == 2:
        return _halves(tile)
    else:
        left, right = _halves(tile)  # pyright: ignore[reportGeneralTypeIssues]
        return _halves(left) + _halves(right)
