"""What the tiles that the tuning table gives make of the roofline's floors, for a routing: counted, never timed.

Whole tiles are multiplied, also where rows or columns end; the last wave leaves multiprocessors idle; weights are read again
where they do not stay in L2; gathered rows are read once per expert where x does not stay in L2.

Left out, beside what the floors leave out: prologue and epilogue of a tile, address arithmetic, and how well loads hide
(`l2_seconds` gives the one bound of L2 bandwidth). Plain Python: imports neither torch nor triton.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from moe_triton.roofline import BYTES, FLOWS, Machine, Part, Shape, uniform_counts, whole_rows
from moe_triton.tuning import pick


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch as these kernels' tiles make it."""

    name: str
    backward: bool
    config: dict[str, int]
    """Tile and launch options; empty for the kernels that only move."""
    flops: float
    """Useful ones."""
    tile_flops: float
    """Of whole tiles."""
    floor_bytes: float
    """Every tensor once."""
    bytes: float
    """With what is read again."""
    tiles: int
    wave_share: float
    """Share of the multiprocessors' time in which they have a tile."""
    floor_seconds: float
    compute_seconds: float
    """Of whole tiles and waves at the rate of large products."""
    memory_seconds: float
    l2_seconds: float | None
    """What the assumed bandwidth from L2 would take for the operands of all tiles; not part of the prediction."""

    @property
    def seconds(self) -> float:
        """Predicted."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> str:
        """What the predicted time is spent on."""
        return "memory" if self.memory_seconds > self.compute_seconds else "compute"

    @property
    def intensity(self) -> float:
        """Useful FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def tile_share(self) -> float:
        """Share of the multiplied FLOPs that is useful."""
        return self.flops / self.tile_flops if self.tile_flops else 1.0


def predict(shape: Shape, machine: Machine, counts: Sequence[float] | None = None) -> list[Kernel]:
    """Every launch of a forward and backward, in order, for a routing's rows per expert (by default uniform).

    counts are scaled to R rows in all. Raises ValueError unless there is one per expert, with a sum above 0.
    """
    counts = uniform_counts(shape) if counts is None else counts
    if len(counts) != shape.E or not sum(counts) > 0:
        raise ValueError(
            f"the routing counts {len(counts)} experts with {sum(counts):g} rows, the shape has {shape.E}: give one count "
            "per expert, and some rows"
        )
    rows = whole_rows(counts, shape)
    return [_predict(part, shape, machine, rows) for part in FLOWS["ours"]]


class _BFloat16:
    itemsize = BYTES

    def __str__(self) -> str:
        return "bfloat16"


def _predict(part: Part, shape: Shape, machine: Machine, counts: list[int]) -> Kernel:
    flops, floor_bytes = part.counts(shape)
    common = {"name": part.name, "backward": part.backward, "flops": flops, "floor_bytes": floor_bytes}
    floor = part.seconds(shape, machine)
    if not flops:
        moving = {"bytes": floor_bytes, "memory_seconds": floor_bytes / machine.bandwidth, "compute_seconds": 0.0}
        idle = {"config": {}, "tile_flops": 0.0, "tiles": shape.T, "wave_share": 1.0, "l2_seconds": None}
        return Kernel(**common, **moving, **idle, floor_seconds=floor)
    D, F, target = shape.D, shape.F, machine.chip.arch
    config = pick(part.name, rows_per_expert=shape.R / shape.E, D=D, F=F, dtype=_BFloat16(), target=target)
    tiling = _tiling(part, shape, config, counts)
    busy = (
        sum(tiling.lengths) / machine.multiprocessors / max(_makespan(tiling.lengths, machine.multiprocessors), 1e-30)
    )
    moved = floor_bytes + _read_again(part, shape, machine, config, tiling, counts)
    return Kernel(
        **common,
        config=config,
        tile_flops=tiling.flops,
        bytes=moved,
        tiles=len(tiling.lengths),
        wave_share=busy,
        floor_seconds=floor,
        compute_seconds=tiling.flops / machine.flops / max(busy, 1e-30),
        memory_seconds=moved / machine.bandwidth,
        l2_seconds=tiling.operand_bytes / machine.l2_bandwidth if machine.l2_bandwidth else None,
    )


@dataclass(frozen=True)
class _Tiling:
    flops: float
    """Of whole tiles."""
    operand_bytes: float
    """What all tiles together load of their two operands."""
    lengths: list[float]
    """Work of every tile, in the order of the launch."""
    row_tiles: list[int]
    """Per expert."""
    column_tiles: int
    rows_bytes: Sequence[float]
    """Per expert, of the operand that is shared by tiles of one row."""
    columns_bytes: Sequence[float]
    """Per expert, of the operand that is shared by tiles of one column."""


_COLUMNS_DEPTH = {"up": "FD", "down": "DF", "hidden_bwd": "FD", "input_bwd": "DF"}
_OUTPUTS = {"up": 2, "w_up_bwd": 2}
"""Accumulators that share the operand of the rows."""


def _tiling(part: Part, shape: Shape, config: dict[str, int], counts: list[int]) -> _Tiling:
    M, N, K = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    size = {"D": shape.D, "F": shape.F}
    if part.name in _COLUMNS_DEPTH:  # a tile of one expert's rows, and all of the depth
        columns, depth = (size[letter] for letter in _COLUMNS_DEPTH[part.name])
        row_tiles, column_tiles = [_cdiv(count, M) for count in counts], _cdiv(columns, N)
        steps = [_cdiv(depth, K)] * len(counts)
        # input_bwd multiplies two pairs of operands, up and hidden_bwd share theirs
        pairs = part.flops // 2
        rows_bytes = [BYTES * count * depth * (pairs if part.name == "input_bwd" else 1) for count in counts]
        columns_bytes = [float(BYTES * depth * columns * pairs) * (count > 0) for count in counts]
    else:  # a tile of one expert's weights, and all of its rows
        rows, columns = (shape.F, shape.D) if part.name == "w_down_bwd" else (shape.D, shape.F)
        row_tiles, column_tiles = [_cdiv(rows, M)] * len(counts), _cdiv(columns, N)
        steps = [_cdiv(count, K) for count in counts]
        pairs = part.flops // 2
        rows_bytes = [float(BYTES * count * rows) for count in counts]
        columns_bytes = [float(BYTES * count * columns * pairs) for count in counts]
    lengths = [float(step) for tiles, step in zip(row_tiles, steps, strict=True) for _ in range(tiles * column_tiles)]
    sharing = 1 if part.name == "input_bwd" else pairs
    loads = (M * pairs / sharing + N * pairs) * K * BYTES
    return _Tiling(
        flops=sum(lengths) * part.flops * M * N * K,
        operand_bytes=sum(lengths) * loads,
        lengths=lengths,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        rows_bytes=rows_bytes,
        columns_bytes=columns_bytes,
    )


L2_SHARE = 0.6
"""Of the cache that one launch's operands can count on."""


def _read_again(
    part: Part, shape: Shape, machine: Machine, config: dict[str, int], tiling: _Tiling, counts: list[int]
) -> float:
    """Bytes beyond the first reading of every tensor: operands that do not stay in L2 between the tiles that share them.

    The tiles that run together form a patch of GROUP row tiles by as many column tiles as there are multiprocessors for;
    within it both operands are read once. An expert whose operands fit into L2 reads them once for all its patches.
    """
    room = L2_SHARE * machine.l2
    group = config["GROUP"]
    width = max(machine.multiprocessors // group, 1)
    extra = 0.0
    for row_tiles, rows, columns in zip(tiling.row_tiles, tiling.rows_bytes, tiling.columns_bytes, strict=True):
        if not row_tiles or rows + columns <= room:
            continue
        # rows of one group are reused by all its columns if they stay; columns only by the rows of their group
        panel = rows * min(group / row_tiles, 1.0)
        if panel > room:
            extra += rows * (_cdiv(tiling.column_tiles, width) - 1)
        if columns > room or row_tiles > group:
            extra += columns * (_cdiv(row_tiles, group) - 1)
    gathered = BYTES * shape.T * shape.D
    if part.token and gathered > room:
        extra += BYTES * (sum(counts) - shape.T) * shape.D
    return max(extra, 0.0)


def _makespan(lengths: Sequence[float], slots: int) -> float:
    """Time until all tiles are done, each given in order to the multiprocessor that is free first."""
    if not lengths:
        return 0.0
    if min(lengths) == max(lengths):
        return _cdiv(len(lengths), slots) * lengths[0]
    busy_until = [0.0] * slots
    for length in lengths:
        heapq.heapreplace(busy_until, busy_until[0] + length)
    return max(busy_until)


def _cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
