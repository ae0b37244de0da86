"""Which tile, warps and stages a kernel is launched with: a table with a reason per row, read on the host, never timed.

A row holds for operators, architectures, a height of the row tile and a least number of output columns. The height itself
follows from the mean number of rows per expert (`tile_height`): half a tile of every expert is waste. So a new number of
tokens changes no launch option until it crosses a power of two, and nothing is retuned during a run.

`tune` measures up to 8 configurations on a GPU and keeps the best per bucket in a file; `pick` looks into that file only
where MOE_TRITON_TUNED names it. Plain Python: imports neither torch nor triton.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moe_triton.targets import nearest

# ops; targets; aligned (yes: rows of the operands start at multiples of 16 bytes, so that loads are wide and asynchronous);
# height: BLOCK_M; columns: least number of output columns; then BLOCK_N, BLOCK_K (for operands of two bytes: pick keeps
# its bytes), GROUP, num_warps, num_stages, SLICES (hidden_bwd alone). Of several rows that fit, the first counts.
# No figure here is a timing: the reasons are counts (reuse of bytes from L2, waste) and what the compiler reports.
_TABLE = """
ops | targets | aligned | height | columns | N | K | group | warps | stages | slices | reason
up | sm_90 sm_100 | yes | 128 | 128 | 128 | 64 | 8 | 8 | 3 | - | two 128×128 accumulators: 85 FLOPs per byte from L2, the most that fits without a spill
up | sm_90 sm_100 | yes | 64 | 128 | 128 | 64 | 8 | 8 | 3 | - | two accumulators as wide as at 128 rows: the weights' bytes dominate, reuse x
up | sm_80 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 3 | - | two accumulators 128 wide spill more than 100 bytes on sm_80, 32 deep too
up | sm_80 | yes | 64 | 128 | 128 | 64 | 8 | 8 | 3 | - | half the rows leave room for 128 columns: 156 registers, 80 KB
up | gfx942 | yes | 128 | 128 | 128 | 32 | 8 | 8 | 2 | - | 24 KB of the 64 KB LDS, so two blocks share a compute unit
up | sm_90 sm_100 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 3 | - | narrow experts
up | sm_80 sm_90 sm_100 | yes | 16 32 64 | 0 | 64 | 64 | 8 | 4 | 4 | - | few rows: bound by the weights' bytes, so many small blocks with loads in flight
up | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | - | as above, within 64 KB
down | sm_80 sm_90 sm_100 | yes | 64 128 | 256 | 256 | 64 | 8 | 8 | 3 | - | one accumulator, so twice the columns of up at the same registers
down | gfx942 | yes | 64 128 | 256 | 256 | 32 | 8 | 8 | 2 | - | 256 columns at half the depth stay within 64 KB
down | sm_80 sm_90 sm_100 | yes | 128 | 0 | 128 | 64 | 8 | 8 | 3 | - | narrow models
down | sm_80 sm_90 sm_100 | yes | 16 32 64 | 0 | 128 | 64 | 8 | 4 | 4 | - | few rows or columns: many small blocks with loads in flight
down | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | - | as above, within 64 KB
hidden_bwd | sm_100 | yes | 128 | 256 | 256 | 64 | 8 | 8 | 3 | 4 | tensor memory holds the accumulator: 164 registers
hidden_bwd | sm_80 sm_90 | yes | 128 | 128 | 128 | 64 | 8 | 8 | 3 | 4 | the epilogue also holds gate, up and their gradients: 256 columns spill on sm_90
hidden_bwd | sm_80 sm_90 sm_100 | yes | 64 | 256 | 256 | 64 | 8 | 8 | 3 | 4 | half the rows leave room for 256 columns
hidden_bwd | gfx942 | yes | 64 128 | 256 | 256 | 32 | 8 | 8 | 2 | 4 | 150 registers, 32 KB
hidden_bwd | sm_80 sm_90 sm_100 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 4 | 2 | few rows or columns: many small blocks with loads in flight
hidden_bwd | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | 2 | as above, within 64 KB
input_bwd | sm_90 sm_100 | yes | 128 | 256 | 256 | 32 | 8 | 8 | 3 | - | two pairs of operands share one accumulator: half the depth keeps them within 227 KB
input_bwd | sm_90 sm_100 | yes | 64 128 | 0 | 128 | 64 | 8 | 8 | 3 | - | 192 KB for two pairs of operands at 128 rows
input_bwd | sm_80 | yes | 64 128 | 0 | 128 | 32 | 8 | 8 | 3 | - | two pairs of operands: half the depth keeps them within the 99 KB of consumer chips too
input_bwd | gfx942 | yes | 64 128 | 256 | 256 | 32 | 8 | 8 | 2 | - | 48 KB, 129 registers
input_bwd | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | - | few rows or columns
input_bwd | sm_80 sm_90 sm_100 | yes | 16 32 | 0 | 128 | 32 | 8 | 4 | 4 | - | few rows: many small blocks with loads in flight
w_down_bwd | sm_80 sm_90 sm_100 | yes | 128 | 256 | 256 | 64 | 8 | 8 | 4 | - | the load of the row's token takes one stage of the pipeline
w_down_bwd | gfx942 | yes | 128 | 256 | 256 | 32 | 8 | 8 | 2 | - | 256 columns at half the depth stay within 64 KB
w_down_bwd | sm_80 sm_90 sm_100 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 5 | - | narrow outputs
w_down_bwd | gfx942 | yes | 128 | 0 | 64 | 32 | 8 | 8 | 2 | - | narrow outputs
w_up_bwd | sm_100 | yes | 128 | 256 | 256 | 64 | 8 | 8 | 3 | - | tensor memory holds both accumulators: 194 registers
w_up_bwd | sm_90 | yes | 128 | 128 | 128 | 64 | 8 | 8 | 5 | - | two accumulators; the load of the row's token takes one stage: 144 KB
w_up_bwd | sm_80 | yes | 128 | 64 | 64 | 64 | 8 | 8 | 5 | - | two accumulators 128 wide spill; 64 wide take 190 registers
w_up_bwd | gfx942 | yes | 128 | 128 | 128 | 32 | 8 | 8 | 2 | - | two accumulators within 156 registers
w_up_bwd | sm_90 sm_100 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 5 | - | narrow outputs
w_up_bwd | gfx942 | yes | 128 | 0 | 64 | 32 | 8 | 8 | 2 | - | narrow outputs
up down input_bwd | sm_80 sm_90 sm_100 gfx942 | no | 128 | 0 | 32 | 32 | 8 | 8 | 2 | - | loads of two bytes go through registers, an address each: wider tiles spill
up down input_bwd | sm_80 sm_90 sm_100 gfx942 | no | 16 32 64 | 0 | 32 | 32 | 8 | 4 | 2 | - | as above
hidden_bwd | sm_80 sm_90 sm_100 gfx942 | no | 128 | 0 | 32 | 32 | 8 | 8 | 2 | 2 | as above
hidden_bwd | sm_80 sm_90 sm_100 gfx942 | no | 16 32 64 | 0 | 32 | 32 | 8 | 4 | 2 | 1 | as above
w_down_bwd w_up_bwd | sm_80 sm_90 sm_100 gfx942 | no | 128 | 0 | 64 | 32 | 8 | 8 | 2 | - | as above; no addresses of rows in the epilogue, so twice the columns
"""  # noqa: E501 (a table reads by its columns)
_OPTIONS = ("BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages", "SLICES")
_OVER_ROWS = ("w_down_bwd", "w_up_bwd")
"""Operators that sum over rows: their BLOCK_M is a tile of weights, not of rows."""
_COLUMNS = {"up": "F", "down": "D", "hidden_bwd": "F", "input_bwd": "D", "w_down_bwd": "D", "w_up_bwd": "F"}
"""Columns of an operator's output."""


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
    """BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages, SLICES where the operator has one."""
    reason: str


def _row(line: str) -> Row:
    ops, targets, aligned, heights, columns, *options, reason = map(str.strip, line.split("|"))
    config = {name: int(text) for name, text in zip(_OPTIONS, options, strict=True) if text != "-"}
    heights_ = tuple(map(int, heights.split()))
    return Row(tuple(ops.split()), tuple(targets.split()), aligned == "yes", heights_, int(columns), config, reason)


TABLE: tuple[Row, ...] = tuple(_row(line) for line in _TABLE.strip().splitlines()[1:])
OPS: tuple[str, ...] = tuple(_COLUMNS)
FILE_VARIABLE = "MOE_TRITON_TUNED"
"""Environment variable that names the file of measured choices; where it is unset, only the table counts."""
MAX_CANDIDATES = 8

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
    if op not in OPS:
        raise KeyError(f"no tuning rows for {op!r}: the operators are {', '.join(OPS)}")
    name = nearest(target).name
    return [row for row in TABLE if op in row.ops and name in row.targets]


def pick(
    op: str, *, rows_per_expert: float, D: int, F: int, dtype: Any, target: str, tile_rows: int | None = None
) -> dict[str, int]:
    """Compile-time values and launch options of an operator: BLOCK_M, BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages.

    rows_per_expert: mean, R/E. dtype: of the operands, anything with `itemsize` in bytes. target: as runtime.target()
    names it. tile_rows: height of the row tiles, where a schedule has fixed it already. hidden_bwd also gets SLICES.
    """
    if op not in OPS:
        raise KeyError(f"no tuning rows for {op!r}: the operators are {', '.join(OPS)}")
    height = tile_rows or tile_height(rows_per_expert, target)
    if target == "interpret":
        return _interpreted(op, height)
    forced = (_forced.get() or {}).get(op)
    if forced is not None:
        return {"BLOCK_M": height, **forced}
    measured = _measured(os.environ.get(FILE_VARIABLE)).get(bucket(op, rows_per_expert, D, F, dtype, target))
    if measured is not None and (op in _OVER_ROWS or measured["BLOCK_M"] == height):
        return dict(measured)
    return candidates(op, height, D, F, dtype, target)[0]


def candidates(op: str, height: int, D: int, F: int, dtype: Any, target: str) -> list[dict[str, int]]:
    """The rows of the table that an operator can be launched with on these sizes, the one that pick takes first."""
    columns = {"D": D, "F": F}[_COLUMNS[op]]
    aligned = D * dtype.itemsize % 16 == 0 and F * dtype.itemsize % 16 == 0
    block_m = 128 if op in _OVER_ROWS else height
    fitting = [
        row
        for row in rows_for(op, target)
        if row.aligned <= aligned and block_m in row.heights and columns >= row.columns
    ]
    return [{"BLOCK_M": block_m, **_fitted(row.config, columns, dtype)} for row in fitting]


def bucket(op: str, rows_per_expert: float, D: int, F: int, dtype: Any, target: str) -> str:
    """Key of a measured choice: sizes are rounded up to powers of two, so that a new number of tokens finds it too."""
    rows, D2, F2 = (_power_of_two(math.ceil(size)) for size in (rows_per_expert, D, F))
    aligned = "aligned" if D * dtype.itemsize % 16 == 0 and F * dtype.itemsize % 16 == 0 else "unaligned"
    return f"{target} {op} rows={rows} D={D2} F={F2} {str(dtype).removeprefix('torch.')} {aligned}"


@contextmanager
def forced(op: str, config: dict[str, int]) -> Iterator[None]:
    """Inside, pick gives `config` for an operator, whatever its sizes; BLOCK_M may be left out.

    The operator "tile_height" with {"BLOCK_M": height} fixes what the function of that name gives.
    """
    token = _forced.set({**(_forced.get() or {}), op: dict(config)})
    try:
        yield
    finally:
        _forced.reset(token)


def tune(
    op: str,
    run: Callable[[], object],
    measure: Callable[[Callable[[], object]], float],
    file: Path,
    *,
    rows_per_expert: float,
    D: int,
    F: int,
    dtype: Any,
    target: str,
    options: Sequence[dict[str, int]] | None = None,
) -> dict[str, int]:
    """Measure an operator under at most 8 configurations and keep the fastest in `file` for its bucket.

    run() calls the operator's public function; measure(run) gives seconds (infinite if it cannot run). options: what to
    try, by default the table's rows that fit and their neighbours in stages. A bucket that is in the file is not measured.
    """
    key = bucket(op, rows_per_expert, D, F, dtype, target)
    known = dict(_read(file))
    if key in known:
        return known[key]
    if options is None:
        rows = candidates(op, tile_height(rows_per_expert, target), D, F, dtype, target)
        deeper = [{**row, "num_stages": row["num_stages"] + step} for row in rows for step in (1, -1)]
        options = [*rows, *(row for row in deeper if row["num_stages"] >= 2)]
    distinct = list({json.dumps(option, sort_keys=True): option for option in options}.values())[:MAX_CANDIDATES]
    seconds = []
    for option in distinct:
        with forced(op, option):
            seconds.append(measure(run))
    best = distinct[seconds.index(min(seconds))]
    known[key] = best
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    partial.replace(file)
    _measured.cache_clear()
    return best


@cache
def _measured(path: str | None) -> dict[str, dict[str, int]]:
    return _read(Path(path)) if path else {}


def _read(file: Path) -> dict[str, dict[str, int]]:
    return json.loads(file.read_text()) if file.exists() else {}


def _interpreted(op: str, height: int) -> dict[str, int]:
    """Small tiles, so that small tests meet several of them."""
    config = {"BLOCK_M": 32 if op in _OVER_ROWS else height, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 4}
    return {**config, "SLICES": 4} if op == "hidden_bwd" else config


def _fitted(config: dict[str, int], columns: int, dtype: Any) -> dict[str, int]:
    """A row's options for operands of another type, and no wider than the output."""
    depth = max(config["BLOCK_K"] * 2 // dtype.itemsize, 32 if dtype.itemsize == 1 else 16)
    width = max(min(config["BLOCK_N"], _power_of_two(columns)), 16)
    return {**config, "BLOCK_K": depth, "BLOCK_N": width}


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
