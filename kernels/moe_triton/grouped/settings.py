"""Launch settings of the two grouped products: a table with a reason per row, read on the host, never timed.

Columns as in moe_triton.tuning, whose operators are those of the expert FFN. Here an operand's strides decide what can be
loaded in wide words, not its sizes alone, so the caller says so. Plain Python: imports neither torch nor triton.
"""

from dataclasses import dataclass

from moe_triton.targets import nearest

# op; targets; aligned (yes: both operands can be read 16 bytes at a time); heights: BLOCK_M; least number of columns for
# which the row counts; then BLOCK_N, BLOCK_K (for operands of two bytes: pick keeps its bytes), GROUP, num_warps,
# num_stages. Of several rows that fit, the first counts.
_TABLE = """
op | targets | aligned | heights | columns | N | K | group | warps | stages | reason
rows | sm_90 sm_100 | yes | 64 128 | 256 | 256 | 64 | 8 | 8 | 3 | one accumulator 256 wide: 85 FLOPs per byte from L2 at 128 rows
rows | sm_80 | yes | 64 128 | 256 | 256 | 32 | 8 | 8 | 3 | the same at half the depth: 252 registers, where 64 deep spill 16 bytes
rows | gfx942 | yes | 64 128 | 256 | 256 | 32 | 8 | 8 | 2 | the same at half the depth, within 64 KB
rows | sm_90 sm_100 | yes | 128 | 0 | 128 | 64 | 8 | 8 | 3 | narrow outputs, and those written across the layout of the accumulator: 180 registers on sm_90, 256 wide spill
rows | sm_80 | yes | 128 | 0 | 128 | 32 | 8 | 8 | 3 | likewise: 223 registers, where 64 deep spill
rows | sm_80 sm_90 sm_100 | yes | 16 32 64 | 0 | 128 | 64 | 8 | 4 | 4 | few rows or columns: many small blocks with loads in flight
rows | gfx942 | yes | 16 32 64 128 | 0 | 64 | 64 | 8 | 4 | 2 | as above, within 64 KB
rows | sm_80 sm_90 sm_100 gfx942 | no | 128 | 0 | 32 | 32 | 8 | 8 | 2 | loads of two bytes go through registers, an address each: wider tiles spill
rows | sm_80 sm_90 sm_100 gfx942 | no | 16 32 64 | 0 | 32 | 32 | 8 | 4 | 2 | as above
inner | sm_90 sm_100 | yes | 128 | 256 | 256 | 64 | 8 | 8 | 3 | one accumulator 256 wide
inner | sm_80 | yes | 128 | 256 | 256 | 32 | 8 | 8 | 3 | the same at half the depth: 244 registers, where 64 deep spill 44 bytes
inner | gfx942 | yes | 128 | 256 | 256 | 32 | 8 | 8 | 2 | the same at half the depth, within 64 KB
inner | sm_80 sm_90 sm_100 | yes | 128 | 0 | 64 | 64 | 8 | 8 | 4 | narrow outputs
inner | sm_80 sm_90 sm_100 | yes | 16 32 64 | 0 | 64 | 64 | 8 | 4 | 4 | small outputs: many small blocks with loads in flight
inner | gfx942 | yes | 16 32 64 128 | 0 | 64 | 32 | 8 | 4 | 2 | as above, within 64 KB
inner | sm_80 sm_90 sm_100 gfx942 | no | 128 | 0 | 32 | 32 | 8 | 8 | 2 | loads of two bytes, as in `rows`
inner | sm_80 sm_90 sm_100 gfx942 | no | 16 32 64 | 0 | 32 | 32 | 8 | 4 | 2 | as above
"""  # noqa: E501 (a table reads by its columns)
_OPTIONS: tuple[str, ...] = ("BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")
OPS = ("rows", "inner")
"""Ragged rows; ragged or whole sums."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    op: str
    targets: tuple[str, ...]
    aligned: bool
    heights: tuple[int, ...]
    columns: int
    config: dict[str, int]
    reason: str


def _row(line: str) -> Row:
    op, targets, aligned, heights, columns, *options, reason = map(str.strip, line.split("|"))
    config = dict(zip(_OPTIONS, map(int, options), strict=True))
    return Row(
        op, tuple(targets.split()), aligned == "yes", tuple(map(int, heights.split())), int(columns), config, reason
    )


TABLE: tuple[Row, ...] = tuple(_row(line) for line in _TABLE.strip().splitlines()[1:])


def rows_for(op: str, target: str) -> list[Row]:
    """All rows of an operator on a target, in the order in which they count."""
    name = nearest(target).name
    return [row for row in TABLE if row.op == op and name in row.targets]


def pick(op: str, *, height: int, columns: int, aligned: bool, itemsize: int, target: str) -> dict[str, int]:
    """Compile-time values and launch options: BLOCK_M (the height), BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages.

    columns: of the output. itemsize: bytes of an operand's element. target: as runtime.target() names it.
    """
    if target == "interpret":  # small tiles, so that small tests meet several of them
        return {"BLOCK_M": min(height, 32), "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 2}
    fitting = (
        row
        for row in rows_for(op, target)
        if row.aligned <= aligned and height in row.heights and columns >= row.columns
    )
    config = next(fitting).config
    return {"BLOCK_M": height, **config, "BLOCK_K": max(config["BLOCK_K"] * 2 // itemsize, 16)}
