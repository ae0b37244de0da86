"""Which tile, warps and stages a kernel is launched with: a table with a reason per row, read on the host, never timed.

A row holds for operators, architectures, a height of the row tile and a least number of output columns. The height itself
follows from the mean number of rows per expert (`tile_height`): half a tile of every expert is waste. So a new number of
tokens changes no launch option until it crosses a power of two, and nothing is retuned during a run.

`autotune` measures up to 8 configurations on a GPU and keeps the best per bucket in a file; `pick` looks into that file only
where MOE_TRITON_TUNED names it. Plain Python: imports neither torch nor triton.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from moe_triton.targets import nearest
from moe_triton.tuned_file import FILE_VARIABLE, choices

# ops; targets; aligned (yes: rows of the operands start at multiples of 16 bytes, so that loads are wide and asynchronous);
# height: BLOCK_M (sdd, dsd: the block); columns: least number of output columns; then BLOCK_N, BLOCK_K (for operands of two
# bytes: pick keeps its bytes), GROUP, num_warps, num_stages, SLICES (hidden_bwd alone), TMA (1: a program on each
# multiprocessor walks over tiles, and contiguous operands are copied by descriptor). Of several rows that fit, the first
# counts. No figure here is a timing: the reasons are counts (reuse of bytes from L2, waste) and what the compiler reports.
_TABLE = """
ops | targets | aligned | height | columns | N | K | group | warps | stages | slices | tma | reason
up | sm_90 sm_100 | yes | 128 | 1024 | 128 | 64 | 8 | 8 | 3 | - | 1 | wide: weights by TMA leave registers and issue slots to the gather, and a program that goes on to its next tile keeps the pipeline full
up | sm_90 sm_100 | yes | 128 | 128 | 128 | 64 | 8 | 8 | 3 | - | - | two 128×128 accumulators: 85 FLOPs per byte from L2, the most that fits without a spill
up | sm_90 sm_100 | yes | 64 | 128 | 128 | 64 | 8 | 8 | 3 | - | - | two accumulators as wide as at 128 rows: the weights' bytes dominate, reuse x
up | sm_80 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 3 | - | - | two accumulators 128 wide spill more than 100 bytes on sm_80, 32 deep too
up | sm_80 | yes | 64 | 128 | 128 | 64 | 8 | 8 | 3 | - | - | half the rows leave room for 128 columns: 156 registers, 80 KB
up | gfx942 | yes | 128 | 128 | 128 | 32 | 8 | 8 | 2 | - | - | 24 KB of the 64 KB LDS, so two blocks share a compute unit
up | sm_90 sm_100 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 3 | - | - | narrow experts
up | sm_80 sm_90 sm_100 | yes | 16 32 64 | 0 | 64 | 64 | 8 | 4 | 4 | - | - | few rows: bound by the weights' bytes, so many small blocks with loads in flight
up | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | - | - | as above, within 64 KB
down | sm_90 sm_100 | yes | 128 | 1024 | 256 | 64 | 8 | 8 | 3 | - | 1 | wide: both operands are boxes of contiguous rows, so the copies take one thread and no registers
down | sm_80 sm_90 sm_100 | yes | 64 128 | 256 | 256 | 64 | 8 | 8 | 3 | - | - | one accumulator, so twice the columns of up at the same registers
down | gfx942 | yes | 64 128 | 256 | 256 | 32 | 8 | 8 | 2 | - | - | 256 columns at half the depth stay within 64 KB
down | sm_80 sm_90 sm_100 | yes | 128 | 0 | 128 | 64 | 8 | 8 | 3 | - | - | narrow models
down | sm_80 sm_90 sm_100 | yes | 16 32 64 | 0 | 128 | 64 | 8 | 4 | 4 | - | - | few rows or columns: many small blocks with loads in flight
down | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | - | - | as above, within 64 KB
hidden_bwd | sm_100 | yes | 128 | 256 | 256 | 64 | 8 | 8 | 3 | 4 | - | tensor memory holds the accumulator: 164 registers
hidden_bwd | sm_80 sm_90 | yes | 128 | 128 | 128 | 64 | 8 | 8 | 3 | 4 | - | the epilogue also holds gate, up and their gradients: 256 columns spill on sm_90
hidden_bwd | sm_80 sm_90 sm_100 | yes | 64 | 256 | 256 | 64 | 8 | 8 | 3 | 4 | - | half the rows leave room for 256 columns
hidden_bwd | gfx942 | yes | 64 128 | 256 | 256 | 32 | 8 | 8 | 2 | 4 | - | 150 registers, 32 KB
hidden_bwd | sm_80 sm_90 sm_100 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 4 | 2 | - | few rows or columns: many small blocks with loads in flight
hidden_bwd | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | 2 | - | as above, within 64 KB
input_bwd | sm_90 sm_100 | yes | 128 | 1024 | 256 | 32 | 8 | 8 | 4 | - | 1 | wide: all four operands are boxes of contiguous rows; 192 KB
input_bwd | sm_90 sm_100 | yes | 128 | 256 | 256 | 32 | 8 | 8 | 3 | - | - | two pairs of operands share one accumulator: half the depth keeps them within 227 KB
input_bwd | sm_90 sm_100 | yes | 64 128 | 0 | 128 | 64 | 8 | 8 | 3 | - | - | 192 KB for two pairs of operands at 128 rows
input_bwd | sm_80 | yes | 64 128 | 0 | 128 | 32 | 8 | 8 | 3 | - | - | two pairs of operands: half the depth keeps them within the 99 KB of consumer chips too
input_bwd | gfx942 | yes | 64 128 | 256 | 256 | 32 | 8 | 8 | 2 | - | - | 48 KB, 129 registers
input_bwd | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | - | - | few rows or columns
input_bwd | sm_80 sm_90 sm_100 | yes | 16 32 | 0 | 128 | 32 | 8 | 4 | 4 | - | - | few rows: many small blocks with loads in flight
w_down_bwd | sm_80 sm_90 sm_100 | yes | 128 | 256 | 256 | 64 | 8 | 8 | 4 | - | - | the load of the row's token takes one stage of the pipeline
w_down_bwd | gfx942 | yes | 128 | 256 | 256 | 32 | 8 | 8 | 2 | - | - | 256 columns at half the depth stay within 64 KB
w_down_bwd | sm_80 sm_90 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 5 | - | - | narrow outputs
w_down_bwd | sm_100 | yes | 128 | 0 | 64 | 64 | 8 | 4 | 5 | - | - | narrow outputs: with eight warps the assembler stops at 64 registers and spills a float32 result
w_down_bwd | gfx942 | yes | 128 | 0 | 64 | 32 | 8 | 8 | 2 | - | - | narrow outputs
w_up_bwd | sm_100 | yes | 128 | 256 | 256 | 64 | 8 | 8 | 3 | - | - | tensor memory holds both accumulators: 194 registers
w_up_bwd | sm_90 | yes | 128 | 128 | 128 | 64 | 8 | 8 | 5 | - | - | two accumulators; the load of the row's token takes one stage: 144 KB
w_up_bwd | sm_80 | yes | 128 | 64 | 64 | 64 | 8 | 8 | 5 | - | - | two accumulators 128 wide spill; 64 wide take 190 registers
w_up_bwd | gfx942 | yes | 128 | 128 | 128 | 32 | 8 | 8 | 2 | - | - | two accumulators within 156 registers
w_up_bwd | sm_90 sm_100 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 5 | - | - | narrow outputs
w_up_bwd | gfx942 | yes | 128 | 0 | 64 | 32 | 8 | 8 | 2 | - | - | narrow outputs
up down input_bwd | sm_80 sm_90 sm_100 gfx942 | no | 128 | 0 | 32 | 32 | 8 | 8 | 2 | - | - | loads of two bytes go through registers, an address each: wider tiles spill
up down input_bwd | sm_80 sm_90 sm_100 gfx942 | no | 16 32 64 | 0 | 32 | 32 | 8 | 4 | 2 | - | - | as above
hidden_bwd | sm_80 sm_90 sm_100 gfx942 | no | 128 | 0 | 32 | 32 | 8 | 8 | 2 | 2 | - | as above
hidden_bwd | sm_80 sm_90 sm_100 gfx942 | no | 16 32 64 | 0 | 32 | 32 | 8 | 4 | 2 | 1 | - | as above
w_down_bwd w_up_bwd | sm_80 sm_90 sm_100 gfx942 | no | 128 | 0 | 64 | 32 | 8 | 8 | 2 | - | - | as above; no addresses of rows in the epilogue, so twice the columns
sdd | sm_80 sm_90 sm_100 | yes | 128 | 0 | - | 64 | - | 8 | 3 | - | - | a block is a tile: 128×128 over two warp groups
sdd | sm_80 sm_90 sm_100 | yes | 64 | 0 | - | 64 | - | 4 | 3 | - | - | 64 rows: one warp group, the least that wgmma and tcgen05 take
sdd | gfx942 | yes | 128 | 0 | - | 32 | - | 8 | 2 | - | - | half the depth stays within 64 KB
sdd | gfx942 | yes | 64 | 0 | - | 32 | - | 4 | 2 | - | - | as above
sdd | sm_80 sm_90 sm_100 | no | 64 128 | 0 | - | 32 | - | 8 | 3 | - | - | an address for each element: eight warps hold those of shallow steps
sdd | gfx942 | no | 64 128 | 0 | - | 32 | - | 8 | 2 | - | - | as above
sdd | sm_80 sm_90 sm_100 | no | 16 32 | 0 | - | 32 | - | 1 | 3 | - | - | a block fits one warp's registers; as many programs as blocks
sdd | gfx942 | no | 16 32 | 0 | - | 32 | - | 1 | 2 | - | - | as above
dsd | sm_80 sm_90 sm_100 | yes | 64 128 | 0 | 128 | 64 | 8 | 8 | 3 | - | - | as many columns as a block has rows at most: one accumulator
dsd | gfx942 | yes | 64 128 | 0 | 128 | 32 | 8 | 8 | 2 | - | - | half the depth stays within 64 KB
dsd | sm_80 sm_90 sm_100 | no | 64 128 | 0 | 128 | 32 | 8 | 8 | 3 | - | - | an address for each element: shallow steps
dsd | gfx942 | no | 64 128 | 0 | 128 | 32 | 8 | 8 | 2 | - | - | as above
dsd | sm_80 sm_90 sm_100 | no | 32 | 0 | 128 | 32 | 8 | 4 | 3 | - | - | a step is a whole block; wide tiles make up for low ones
dsd | gfx942 | no | 32 | 0 | 128 | 32 | 8 | 4 | 2 | - | - | as above
dsd | sm_80 sm_90 sm_100 | no | 16 | 0 | 128 | 16 | 8 | 2 | 3 | - | - | as above
dsd | gfx942 | no | 16 | 0 | 128 | 16 | 8 | 2 | 2 | - | - | as above
"""  # noqa: E501 (a table reads by its columns)
_OPTIONS = ("BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages", "SLICES", "TMA")
_OVER_ROWS = ("w_down_bwd", "w_up_bwd")
"""Operators that sum over rows: their BLOCK_M is a tile of weights, not of rows."""
_COLUMNS = {"up": "F", "down": "D", "hidden_bwd": "F", "input_bwd": "D", "w_down_bwd": "D", "w_up_bwd": "F"}
"""Columns of an operator's output."""
_DEFAULTS: dict[str, dict[str, int]] = {"up": {"SLICES": 4, "TMA": 0}, "down": {"TMA": 0}, "input_bwd": {"TMA": 0}}
"""Options of an operator that its rows may leave out."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    ops: tuple[str, ...]
    targets: tuple[str, ...]
    aligned: bool
    """Whether rows of the operands must start at multiples of 16 bytes."""
    heights: tuple[int, ...]
    """BLOCK_M."""
    columns: int
    """Least number of output columns for which the row counts."""
    config: dict[str, int]
    """BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages, SLICES and TMA where the operator has them."""
    reason: str


def _row(line: str) -> Row:
    ops, targets, aligned, heights, columns, *options, reason = map(str.strip, line.split("|"))
    config = {name: int(text) for name, text in zip(_OPTIONS, options, strict=True) if text != "-"}
    heights_ = tuple(map(int, heights.split()))
    return Row(tuple(ops.split()), tuple(targets.split()), aligned == "yes", heights_, int(columns), config, reason)


TABLE: tuple[Row, ...] = tuple(_row(line) for line in _TABLE.strip().splitlines()[1:])
OPS: tuple[str, ...] = tuple(_COLUMNS)
"""The six products of the expert FFN, which `pick` knows."""
BLOCK_OPS: tuple[str, ...] = ("sdd", "dsd")
"""The block-sparse products, which `pick_block` knows."""

_forced: ContextVar[dict[str, dict[str, int]] | None] = ContextVar("forced", default=None)


def tile_height(rows_per_expert: float, target: str) -> int:
    """Rows of a tile, 16 to 128: the mean share of an expert, since half a tile of each expert is waste.

    Past 32 rows never less than 64, the least that the matrix units of sm_90 and later take at full rate.
    """
    height = (_forced.get() or {}).get("tile_height")
    if height is not None:
        return height["BLOCK_M"]
    if target == "interpret":
        return 16
    share = _power_of_two(math.ceil(rows_per_expert))
    return min(max(share, 16 if share <= 32 else 64), 128)


def rows_for(op: str, target: str) -> list[Row]:
    """All rows of an operator on a target, in the order in which they count. Raises KeyError for an unknown operator."""
    if op not in (*OPS, *BLOCK_OPS):
        raise KeyError(f"no tuning rows for {op!r}: the operators are {', '.join((*OPS, *BLOCK_OPS))}")
    name = nearest(target).name
    return [row for row in TABLE if op in row.ops and name in row.targets]


def pick(
    op: str,
    *,
    rows_per_expert: float,
    D: int,
    F: int,
    dtype: Any,
    target: str,
    tile_rows: int | None = None,
    tma: bool = True,
) -> dict[str, int]:
    """Compile-time values and launch options of an operator: BLOCK_M, BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages.

    rows_per_expert: mean, R/E. dtype: of the operands, anything with `itemsize` in bytes. target: as runtime.target()
    names it. tile_rows: height of the row tiles, where a schedule has fixed it already. tma: whether the operands can be
    described (tiles.can_describe). up and hidden_bwd also get SLICES; up, down and input_bwd TMA.
    """
    if op not in OPS:
        raise KeyError(f"no tuning rows for {op!r}: the operators are {', '.join(OPS)}")
    height = tile_rows or tile_height(rows_per_expert, target)
    forced = (_forced.get() or {}).get(op)
    if forced is not None and tma >= forced.get("TMA", 0):
        interpreted = _interpreted(op, height) if target == "interpret" else {}
        return {**_DEFAULTS.get(op, {}), "BLOCK_M": height, **interpreted, **forced}
    if target == "interpret":
        return _interpreted(op, height)
    measured = choices(os.environ.get(FILE_VARIABLE)).get(bucket(op, rows_per_expert, D, F, dtype, target))
    if measured is not None and (op in _OVER_ROWS or measured["BLOCK_M"] == height) and tma >= measured.get("TMA", 0):
        return dict(measured)
    return candidates(op, height, D, F, dtype, target, tma=tma)[0]


def candidates(
    op: str, height: int, D: int, F: int, dtype: Any, target: str, *, tma: bool = True
) -> list[dict[str, int]]:
    """The rows of the table that an operator can be launched with on these sizes, the one that pick takes first."""
    columns = {"D": D, "F": F}[_COLUMNS[op]]
    aligned = D * dtype.itemsize % 16 == 0 and F * dtype.itemsize % 16 == 0
    return _fitting(op, 128 if op in _OVER_ROWS else height, columns, dtype, target, aligned, tma)


def pick_block(op: str, *, block: int, columns: int, aligned: bool, dtype: Any, target: str) -> dict[str, int]:
    """Options of a block-sparse product, BLOCK_M = block among them; dsd also gets BLOCK_N and GROUP.

    columns: of the dense operand or result. aligned: rows of all operands start at multiples of 16 elements, and
    every tile is a whole block. Raises KeyError for an unknown operator.
    """
    forced = (_forced.get() or {}).get(op)
    if forced is not None:
        return {"BLOCK_M": block, **forced}
    config = _fitting(op, block, columns, dtype, "sm_90" if target == "interpret" else target, aligned, False)[0]
    return {**config, "BLOCK_K": min(config["BLOCK_K"], block if op == "dsd" else config["BLOCK_K"])}


def _fitting(
    op: str, height: int, columns: int, dtype: Any, target: str, aligned: bool, tma: bool
) -> list[dict[str, int]]:
    fitting = [
        row
        for row in rows_for(op, target)
        if row.aligned <= aligned
        and height in row.heights
        and columns >= row.columns
        and row.config.get("TMA", 0) <= (tma and dtype.itemsize <= 4)
    ]
    defaults = {**_DEFAULTS.get(op, {}), "BLOCK_M": height}
    return [{**defaults, **_fitted(row.config, columns, dtype)} for row in fitting]


def bucket(op: str, rows_per_expert: float, D: int, F: int, dtype: Any, target: str) -> str:
    """Key of a measured choice: sizes are rounded up to powers of two, so that a new number of tokens finds it too."""
    rows, D2, F2 = (_power_of_two(math.ceil(size)) for size in (rows_per_expert, D, F))
    aligned = "aligned" if D * dtype.itemsize % 16 == 0 and F * dtype.itemsize % 16 == 0 else "unaligned"
    return f"{target} {op} rows={rows} D={D2} F={F2} {str(dtype).removeprefix('torch.')} {aligned}"


@contextmanager
def forced(op: str, config: dict[str, int]) -> Iterator[None]:
    """Inside, pick gives `config` for an operator, whatever its sizes; BLOCK_M may be left out.

    Under the interpreter what `config` leaves out is as without it. The operator "tile_height" with {"BLOCK_M": height}
    fixes what the function of that name gives.
    """
    token = _forced.set({**(_forced.get() or {}), op: dict(config)})
    try:
        yield
    finally:
        _forced.reset(token)


def _interpreted(op: str, height: int) -> dict[str, int]:
    """Small tiles, so that small tests meet several of them."""
    rows, depth = (64, 16) if op in _OVER_ROWS else (height, 32)
    config = {**_DEFAULTS.get(op, {}), "BLOCK_M": rows, "BLOCK_N": 64, "BLOCK_K": depth, "GROUP": 4}
    return {**config, "SLICES": 4} if op == "hidden_bwd" else config


def _fitted(config: dict[str, int], columns: int, dtype: Any) -> dict[str, int]:
    """A row's options for operands of another type, and no wider than the output."""
    depth = max(config["BLOCK_K"] * 2 // dtype.itemsize, 32 if dtype.itemsize == 1 else 16)
    width = max(min(config.get("BLOCK_N", 0), _power_of_two(columns)), 16)
    return {**config, "BLOCK_K": depth, **({"BLOCK_N": width} if "BLOCK_N" in config else {})}


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
