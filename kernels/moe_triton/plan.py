"""The routing plan: which rows meet which expert, on the device, without a host synchronisation.

From a routing's triples (row r: token, expert; expert E for a row that goes nowhere) to a stable order by expert. Eager
torch would sort, count, scan and invert: six launches and a radix sort of int64 keys. Here four small kernels count rows
per block of rows and expert, scan those counts, give each row its place, and list the row tiles of every expert. A place
is an expert's offset plus the rank of the row within its expert, never an atomic cursor, so two runs are bitwise equal.

With a capacity the rows are ordered twice: in the first order an expert's rows of one group of tokens (a row of the batch)
stand together, so a row is beyond the capacity exactly if the row `capacity` places before it is of the same group.

Nothing here has a gradient. Index tensors of rows are int32: R < 2^31.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_triton.compile_case import CompileCase
from moe_triton.plan_kernels import (
    plan_count_kernel,
    plan_drop_kernel,
    plan_place_kernel,
    plan_scan_kernel,
    plan_schedule_kernel,
)
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


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a tile, 16 to 128, by the mean share of an expert (tuning.tile_height).

    Compared with powers of two, not computed from, so that a traced number of rows is guarded by those bounds only.
    """
    for share in (16, 32, 64, *_SMALL_TILES_UP_TO):
        if num_rows <= share * num_experts:
            return _height(share)
    return _height(512)


_SMALL_TILES_UP_TO = (256,) if INTERPRETING else ()
"""Rows per expert up to which interpreted tiles have 32 rows at most, so that small tests meet several."""


@torch.compiler.assume_constant_result
def _height(share: int) -> int:
    height = tile_height(share, "gpu")
    return min(height, 32) if INTERPRETING and share <= 256 else height


def _block(num_rows: int) -> int:
    """Rows that a program counts or places; few when interpreted, so that small tests meet several programs."""
    return 128 if INTERPRETING and num_rows <= 1024 else 1024


def max_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """The most row tiles that any routing of `num_rows` rows can need: known on the host, whatever the counts."""
    if num_rows <= num_experts:
        return num_rows
    return num_experts - 1 + cdiv(num_rows - num_experts + 1, rows)


def _ordered(token_R: Tensor, expert_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_P, row_P, reverse_R, offsets_E1) by three launches."""
    R, device = token_R.shape[0], token_R.device
    bins, block = num_experts + 1, _block(R)
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


_plan = torch.library.custom_op("moe_triton::plan", _ordered, mutates_args=())


@_plan.register_fake
def _(token_R, expert_R, num_experts):
    token_P, row_P, reverse_R = (torch.empty_like(token_R, dtype=torch.int32) for _ in range(3))
    return token_P, row_P, reverse_R, token_R.new_empty(num_experts + 1, dtype=torch.int64)


@torch.library.custom_op("moe_triton::drop_beyond_capacity", mutates_args=())
def _drop(token_R: Tensor, expert_R: Tensor, num_experts: int, capacity: int, tokens_per_group: int) -> Tensor:
    R = token_R.shape[0]
    block, expert_R = _block(R), expert_R.contiguous()
    token_P, row_P, _, offsets_E1 = _ordered(token_R, expert_R, num_experts)
    kept_R = torch.empty_like(expert_R)
    sizes = (R, num_experts + 1, min(capacity, R), tokens_per_group)
    launch(plan_drop_kernel, (cdiv(R, block),), token_P, row_P, expert_R, offsets_E1, kept_R, *sizes, BLOCK=block)
    return kept_R


@_drop.register_fake
def _(token_R, expert_R, num_experts, capacity, tokens_per_group):
    return torch.empty_like(expert_R, memory_format=torch.contiguous_format)


def drop_beyond_capacity(
    token_R: Tensor, expert_R: Tensor, *, num_experts: int, capacity: int, tokens_per_group: int
) -> Tensor:
    """expert_R with E for every row that `capacity` rows of its expert precede in its group of tokens: first come first served.

    token_R [R] int ascending, expert_R [R] int; token t is of group t // tokens_per_group, so with S tokens in each row of a
    batch, tokens_per_group=S drops within a row of the batch and never for a later one. Raises ValueError for negative sizes.
    """
    if capacity < 0 or tokens_per_group < 1:
        raise ValueError(
            f"capacity ({capacity}) must be at least 0 and tokens_per_group ({tokens_per_group}) at least 1: "
            "give the number of rows that an expert takes from each group of that many tokens"
        )
    return _drop(token_R, expert_R, num_experts, capacity, tokens_per_group)


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


def routing_plan(
    token_R: Tensor,
    expert_R: Tensor,
    token_offsets: Tensor,
    *,
    num_experts: int,
    capacity: int | None = None,
    tokens_per_group: int | None = None,
) -> RoutingPlan:
    """Order a routing's rows by expert, stable, so that rows of one expert keep the routing's order.

    token_R, expert_R [R] int: token and expert of each row, rows in ascending token order, expert E for a row that goes
    nowhere; token_offsets [T+1] int. Any number of rows per token, any E below 2^20; R or T may be 0. With a capacity, rows
    beyond it go nowhere as well (drop_beyond_capacity); tokens_per_group is then needed.
    """
    if num_experts >= MAX_EXPERTS:
        raise ValueError(f"num_experts ({num_experts}) must be less than {MAX_EXPERTS}: sort keys have 31 bits")
    if (capacity is None) != (tokens_per_group is None):
        raise ValueError(
            f"capacity ({capacity}) and tokens_per_group ({tokens_per_group}) come together: "
            "a capacity is a number of rows per expert from each group of tokens"
        )
    if capacity is not None and tokens_per_group is not None:
        limits = {"capacity": capacity, "tokens_per_group": tokens_per_group}
        expert_R = drop_beyond_capacity(token_R, expert_R, num_experts=num_experts, **limits)
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


def compile_cases() -> list[CompileCase]:
    """A plan with drops, of F experts."""

    def run(dtype: torch.dtype, D: int, F: int) -> None:
        del dtype, D
        rows = torch.zeros(2048, dtype=torch.int64)
        offsets = torch.zeros(1025, dtype=torch.int64)
        routing_plan(rows, rows, offsets, num_experts=F, capacity=10, tokens_per_group=128)

    return [CompileCase("capacity", False, run)]
