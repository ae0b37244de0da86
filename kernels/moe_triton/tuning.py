"""Which tile, warps and stages a kernel is launched with: a table with a reason per row, read on the host, never timed.

A row holds for an operator, an architecture, a height of the row tile and a least number of output columns. The height
itself follows from the mean number of rows per expert (`tile_height`): half a tile of every expert is waste. So a new
number of tokens changes no launch option until it crosses a power of two, and nothing is ever retuned during a run.

`tune` measures up to 8 rows of the table on a GPU and keeps the best per bucket in a file; `pick` looks into that file
only where MOE_TRITON_TUNED names it. Plain Python: imports neither torch nor triton.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_triton.targets import nearest

# Tile heights ("M" = that of the row schedule), least columns, then what the kernel is launched with. BLOCK_K is for
# operands of two bytes; pick() keeps its bytes for other types. Of several rows that fit, the first counts.
_TABLE = """
op       | targets      | height  | columns | N   | K  | group | warps | stages | reason
up       | sm_80        | 128     | 128     | 128 | 32 | 8     | 8     | 4      | two 128×128 accumulators; 64 deep spills
up       | sm_90 sm_100 | 128     | 128     | 128 | 64 | 8     | 8     | 3      | two 128×128 accumulators: the best reuse per byte from L2 that does not spill
up       | sm_80 sm_90 sm_100 | 64 | 64     | 64  | 64 | 8     | 4     | 4      | little weight reuse at 64 rows: two blocks per multiprocessor hide each other's loads
up       | sm_80 sm_90 sm_100 | 16 32 64 128 | 0 | 64 | 64 | 8  | 4     | 4      | few rows: bound by the weights' bytes, so many small blocks in flight
up       | gfx942       | 64 128  | 0       | 64  | 64 | 8     | 8     | 2      | 64 KB of LDS; two accumulators of 64 columns
up       | gfx942       | 16 32   | 0       | 64  | 64 | 8     | 4     | 2      | few rows: bound by the weights' bytes
"""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    op: str
    targets: tuple[str, ...]
    heights: tuple[int, ...]
    """BLOCK_M; for products over rows (op dw_*) the height of the output tile, otherwise that of the row schedule."""
    columns: int
    """Least number of output columns for which the row counts."""
    config: dict[str, int]
    """BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages."""
    reason: str
