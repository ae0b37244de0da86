"""The kernels of plan.py: count rows per block and expert, scan the counts, give every row its place, drop, list the tiles."""

import triton
import triton.language as tl


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
def plan_drop_kernel(
    token_P_ptr,  # [P] int32
    row_P_ptr,  # [P] int32
    expert_ptr,  # [R] int
    offsets_ptr,  # [E + 1] int64
    kept_ptr,  # [R] int
    num_rows,
    num_bins,
    capacity,
    tokens_per_group,
    BLOCK: tl.constexpr,
):
    """The expert of every row, and E for those that `capacity` rows of the same expert and group of tokens precede."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_rows
    row = tl.load(row_P_ptr + place, mask=inside, other=num_rows)
    expert = _expert_of(expert_ptr, row, num_rows, num_bins)
    earlier = place - capacity
    follows = inside & (earlier >= tl.load(offsets_ptr + expert, mask=inside, other=0))
    group = tl.load(token_P_ptr + place, mask=inside, other=0) // tokens_per_group
    group_of_earlier = tl.load(token_P_ptr + earlier, mask=follows, other=0) // tokens_per_group
    dropped = follows & (group == group_of_earlier)
    tl.store(kept_ptr + row, tl.where(dropped, num_bins - 1, expert), mask=inside)


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
