"""The routing plan: which rows meet which expert, on the device, without a host synchronisation.

From a routing's triples (row r: token, expert; expert E for a row that goes nowhere) to a stable order by expert. Eager
torch would sort, count, scan and invert: six launches and a radix sort of int64 keys. Here four small kernels count rows
per block of rows and expert, scan those counts, give each row its place, and list the row tiles of every expert. A place
is an expert's offset plus the rank of the row within its expert, never an atomic cursor, so two runs are bitwise equal.

Nothing here has a gradient. Index tensors of rows are int32: R < 2^31.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton.runtime import INTERPRETING, cdiv, launch, next_power_of_two
from moe_triton.tuning import tile_height

MAX_EXPERTS = 1 << 20
"""Sort keys are expert · block + row within the block, in 31 bits."""


class RoutingPlan(NamedTuple):
    """Rows in expert order, P = R of them; those that go nowhere come last and are never computed."""

    token_P: Tensor
    """Token of each row in expert order, int32 or int64."""
    row_P: Tensor
    """The routing's row at each place, int32 or int64."""
    reverse_R: Tensor
    """The place of each of the routing's rows, int32 or int64."""
    offsets_E1: Tensor
    """Rows of expert e are offsets_E1[e] : offsets_E1[e+1]; int64, E+1 entries."""
    token_offsets: Tensor
    """The routing's rows of token t are token_offsets[t] : token_offsets[t+1]; T+1 entries."""
    schedule: Tensor
    """(expert, first row) of every row tile, int32 [max_tiles, 2]; expert -1 past the last tile."""
    tile_rows: int
    """Rows of a tile."""

    @property
    def counts_E(self) -> Tensor:
        """Rows per expert, int64."""
        return self.offsets_E1.diff()


@triton.jit
def _expert_of(expert_ptr, row, num_rows, num_bins):
    """Expert of each row: any index that is no expert goes nowhere (bin E); lanes past the last row get num_bins."""
    inside = row < num_rows
    expert = tl.load(expert_ptr + row, mask=inside, other=0).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < num_bins), expert, num_bins - 1)
    return tl.where(inside, expert, num_bins)


@triton.jit
def plan_count_kernel(
    expert_ptr,  # [R] int
    counts_ptr,  # [blocks, E + 1] int32
    num_rows,
    num_bins,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Rows per expert within each block of rows; rows that go nowhere are counted as expert E."""
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    expert = _expert_of(expert_ptr, row, num_rows, num_bins)
    counts = tl.histogram(expert, BINS)
    bin = tl.arange(0, BINS)
    tl.store(counts_ptr + block.to(tl.int64) * num_bins + bin, counts, mask=bin < num_bins)


@triton.jit
def plan_scan_kernel(
    counts_ptr,  # [blocks, E + 1] int32
    base_ptr,  # [blocks, E + 1] int32
    offsets_ptr,  # [E + 1] int64
    num_blocks,
    num_bins,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Offsets per expert, and what to add to a row's position in its block's sorted order to get its place."""
    bin = tl.arange(0, BINS)
    total = tl.zeros([BINS], dtype=tl.int32)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = (block[:, None] < num_blocks) & (bin[None, :] < num_bins)
        at = block[:, None].to(tl.int64) * num_bins + bin[None, :]
        total += tl.sum(tl.load(counts_ptr + at, mask=inside, other=0), axis=0)
    before = tl.cumsum(total, axis=0) - total
    tl.store(offsets_ptr + bin, before.to(tl.int64), mask=bin < num_bins)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = (block[:, None] < num_blocks) & (bin[None, :] < num_bins)
        at = block[:, None].to(tl.int64) * num_bins + bin[None, :]
        counts = tl.load(counts_ptr + at, mask=inside, other=0)
        earlier_blocks = tl.cumsum(counts, axis=0) - counts
        within_block = tl.cumsum(counts, axis=1) - counts
        tl.store(base_ptr + at, before[None, :] + earlier_blocks - within_block, mask=inside)
        before += tl.sum(counts, axis=0)


@triton.jit
def plan_place_kernel(
    token_ptr,  # [R] int
    expert_ptr,  # [R] int
    base_ptr,  # [blocks, E + 1] int32
    token_P_ptr,  # [P] int32
    row_P_ptr,  # [P] int32
    reverse_ptr,  # [R] int32
    num_rows,
    num_bins,
    BLOCK: tl.constexpr,
):
    """Sort a block's rows by (expert, row) and write each to its place."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    row = block * BLOCK + lane
    expert = _expert_of(expert_ptr, row, num_rows, num_bins)
    key = tl.sort(expert * BLOCK + lane)
    expert = key // BLOCK
    row = block * BLOCK + key % BLOCK
    inside = expert < num_bins
    place = lane + tl.load(base_ptr + block.to(tl.int64) * num_bins + expert, mask=inside, other=0)
    token = tl.load(token_ptr + row, mask=inside, other=0).to(tl.int32)
    tl.store(token_P_ptr + place, token, mask=inside)
    tl.store(row_P_ptr + place, row, mask=inside)
    tl.store(reverse_ptr + row, place, mask=inside)


@triton.jit
def plan_schedule_kernel(
    offsets_ptr,  # [E + 1] int64
    schedule_ptr,  # [max_tiles, 2] int32
    num_experts,
    max_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Program e lists the row tiles of expert e; the last program marks what is left as unused."""
    expert = tl.program_id(0)
    bin = tl.arange(0, BINS)
    inside = bin < tl.minimum(expert, num_experts)
    rows = tl.load(offsets_ptr + bin + 1, mask=inside, other=0) - tl.load(offsets_ptr + bin, mask=inside, other=0)
    first_tile = tl.sum((rows + TILE_ROWS - 1) // TILE_ROWS, axis=0).to(tl.int32)
    if expert < num_experts:
        first_row = tl.load(offsets_ptr + expert)
        num_rows = tl.load(offsets_ptr + expert + 1) - first_row
        num_tiles = ((num_rows + TILE_ROWS - 1) // TILE_ROWS).to(tl.int32)
        for start in range(0, num_tiles, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            row = (first_row + tile * TILE_ROWS).to(tl.int32)
            tl.store(schedule_ptr + 2 * (first_tile + tile), tl.zeros_like(tile) + expert, mask=tile < num_tiles)
            tl.store(schedule_ptr + 2 * (first_tile + tile) + 1, row, mask=tile < num_tiles)
    else:
        for start in range(first_tile, max_tiles, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            tl.store(schedule_ptr + 2 * tile, tl.full([BLOCK], -1, tl.int32), mask=tile < max_tiles)
            tl.store(schedule_ptr + 2 * tile + 1, tl.zeros([BLOCK], tl.int32), mask=tile < max_tiles)


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a tile, 16 to 128, by the mean share of an expert (tuning.tile_height).

    Compared with powers of two, not computed from, so that a traced number of rows is guarded by those bounds only.
    """
    for share in (16, 32, 64):
        if num_rows <= share * num_experts:
            return _height(share)
    return _height(128)


@torch.compiler.assume_constant_result
def _height(share: int) -> int:
    height = tile_height(share, "gpu")
    return min(height, 32) if INTERPRETING else height  # so that small tests meet several tiles


def max_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """The most row tiles that any routing of `num_rows` rows can need: known on the host, whatever the counts."""
    if num_rows <= num_experts:
        return num_rows
    return num_experts - 1 + cdiv(num_rows - num_experts + 1, rows)


@torch.library.custom_op("moe_triton::plan", mutates_args=())
def _plan(token_R: Tensor, expert_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, device = token_R.shape[0], token_R.device
    bins, block = num_experts + 1, 128 if INTERPRETING else 1024
    blocks, BINS = cdiv(R, block), max(next_power_of_two(bins + 1), 32)
    token_P, row_P, reverse_R = (torch.empty(R, dtype=torch.int32, device=device) for _ in range(3))
    offsets_E1 = torch.empty(bins, dtype=torch.int64, device=device)
    counts, base = (torch.empty(blocks, bins, dtype=torch.int32, device=device) for _ in range(2))
    token_R, expert_R = token_R.contiguous(), expert_R.contiguous()
    launch(plan_count_kernel, (blocks,), expert_R, counts, R, bins, BLOCK=block, BINS=BINS)
    scan_rows = max(4096 // BINS, 1)
    launch(plan_scan_kernel, (1,), counts, base, offsets_E1, blocks, bins, BLOCK=scan_rows, BINS=BINS)
    launch(plan_place_kernel, (blocks,), token_R, expert_R, base, token_P, row_P, reverse_R, R, bins, BLOCK=block)
    return token_P, row_P, reverse_R, offsets_E1


@_plan.register_fake
def _(token_R, expert_R, num_experts):
    token_P, row_P, reverse_R = (torch.empty_like(token_R, dtype=torch.int32) for _ in range(3))
    return token_P, row_P, reverse_R, token_R.new_empty(num_experts + 1, dtype=torch.int64)


@torch.library.custom_op("moe_triton::schedule_tiles", mutates_args=())
def _schedule(offsets_E1: Tensor, num_rows: int, rows: int) -> Tensor:
    E = offsets_E1.shape[0] - 1
    tiles = max_tiles(num_rows, E, rows)
    schedule = torch.empty(tiles, 2, dtype=torch.int32, device=offsets_E1.device)
    sizes = {"TILE_ROWS": rows, "BLOCK": 128, "BINS": next_power_of_two(E)}
    launch(plan_schedule_kernel, (E + 1,), offsets_E1.contiguous(), schedule, E, tiles, **sizes)
    return schedule


@_schedule.register_fake
def _(offsets_E1, num_rows, rows):
    tiles = max_tiles(num_rows, offsets_E1.shape[0] - 1, rows)
    return offsets_E1.new_empty(tiles, 2, dtype=torch.int32)


def schedule_tiles(offsets_E1: Tensor, num_rows: int, rows: int) -> Tensor:
    """(expert, first row) of every tile of `rows` rows, int32 [max_tiles, 2]; no tile crosses an expert's end.

    offsets_E1 [E+1] int; num_rows is the host's bound on offsets_E1[E]. Tiles past the last have expert -1 and row 0.
    """
    return _schedule(offsets_E1, num_rows, rows)


def routing_plan(token_R: Tensor, expert_R: Tensor, token_offsets: Tensor, *, num_experts: int) -> RoutingPlan:
    """Order a routing's rows by expert, stable, so that rows of one expert keep the routing's order.

    token_R, expert_R [R] int: token and expert of each row, rows in ascending token order, expert E for a row that goes
    nowhere; token_offsets [T+1] int. Any number of rows per token, any E below 2^20; R or T may be 0.
    """
    if num_experts >= MAX_EXPERTS:
        raise ValueError(f"num_experts ({num_experts}) must be less than {MAX_EXPERTS}: sort keys have 31 bits")
    R = token_R.shape[0]
    token_P, row_P, reverse_R, offsets_E1 = _plan(token_R, expert_R, num_experts)
    rows = tile_rows(R, num_experts)
    schedule = schedule_tiles(offsets_E1, R, rows)
    return RoutingPlan(token_P, row_P, reverse_R, offsets_E1, token_offsets, schedule, rows)


def plan_from_order(token_P: Tensor, row_P: Tensor, offsets_E1: Tensor, *, num_tokens: int) -> RoutingPlan:
    """The plan of rows that are in expert order already: place p holds row row_P[p] of the routing, of token token_P[p].

    token_P, row_P [P] int64, row_P a permutation; the routing's rows are in ascending token order; offsets_E1 [E+1] int64.
    """
    P, E = row_P.shape[0], offsets_E1.shape[0] - 1
    reverse_R = torch.empty_like(row_P).scatter_(0, row_P, torch.arange(P, device=row_P.device))
    token_R = token_P.index_select(0, reverse_R)
    token_offsets = torch.searchsorted(token_R, torch.arange(num_tokens + 1, device=row_P.device))
    rows = tile_rows(P, E)
    schedule = schedule_tiles(offsets_E1, P, rows)
    return RoutingPlan(token_P, row_P, reverse_R, offsets_E1, token_offsets, schedule, rows)
