"""The device's routing plan against moe_triton.reference (torch's stable argsort, counting) and moe.routing, exactly."""

import pytest
import torch
from torch import Tensor

from moe.routing import Routing, Selection, Tokens, apply_capacity
from moe.routing import plan as layer_plan
from moe_triton import reference
from moe_triton.plan import max_tiles, plan_from_order, routing_plan, schedule_tiles, tile_rows


def offsets_of(token_R: Tensor, T: int) -> Tensor:
    """CSR offsets of ascending tokens."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(token_R, minlength=T).cumsum(0)])


def routing_of(T: int, E: int, most: int, kind: str) -> tuple[Tensor, Tensor]:
    """token_R ascending with 0 to `most` rows per token, expert_R with repeats and, mostly, rows that go nowhere."""
    token_R = torch.arange(T).repeat_interleave(torch.randint(0, most + 1, (T,)))
    expert_R = torch.randint(0, E + 1, token_R.shape)
    if kind == "one":
        expert_R[:] = E - 1
    if kind == "nowhere":
        expert_R[:] = E
    if kind == "not an expert":
        expert_R = torch.where(torch.rand(token_R.shape) < 0.5, -1, expert_R + 1)
    return token_R, expert_R


@pytest.mark.parametrize(
    "T, E, most, kind",
    [
        (0, 4, 2, "any"),
        (1, 1, 1, "any"),
        (40, 2, 3, "any"),
        (97, 7, 5, "any"),  # several blocks of rows
        (150, 60, 2, "any"),
        (30, 128, 8, "any"),
        (3, 300, 2, "any"),  # fewer rows than experts
        (50, 7, 4, "one"),
        (50, 7, 4, "nowhere"),
        (50, 7, 4, "not an expert"),
    ],
)
def test_plan_equals_a_stable_sort(T, E, most, kind):
    token_R, expert_R = routing_of(T, E, most, kind)
    token_offsets = offsets_of(token_R, T)
    plan = routing_plan(token_R, expert_R, token_offsets, num_experts=E)
    token_P, row_P, reverse_R, offsets_E1, tiles = reference.routing_plan(
        token_R, expert_R, num_experts=E, tile_rows=plan.tile_rows
    )
    assert plan.token_P.tolist() == token_P.tolist()
    assert plan.row_P.tolist() == row_P.tolist()
    assert plan.reverse_R.tolist() == reverse_R.tolist()
    assert plan.offsets_E1.tolist() == offsets_E1.tolist()
    assert plan.counts_E.tolist() == offsets_E1.diff().tolist()
    unused = len(plan.schedule) - len(tiles)
    assert unused >= 0
    assert [tuple(tile) for tile in plan.schedule.tolist()] == [*tiles, *[(-1, 0)] * unused]
    ordered = plan_from_order(token_P, row_P, offsets_E1, num_tokens=T)
    for name in ("reverse_R", "token_offsets", "schedule"):
        assert getattr(ordered, name).tolist() == getattr(plan, name).tolist(), name


@pytest.mark.parametrize(
    "T, E, most, group, kind, capacity",
    [
        (0, 4, 2, 5, "any", 1),
        (40, 2, 3, 8, "any", 3),
        (97, 7, 5, 10, "any", 2),  # several blocks of rows, and a last group that is not full
        (60, 3, 4, 7, "not an expert", 1),
        *(
            pytest.param(*shape, capacity, marks=pytest.mark.full)
            for capacity in (0, 1, 3, 10**9)
            for shape in (
                (1, 1, 3, 1, "any"),
                (150, 60, 2, 150, "any"),
                (97, 7, 5, 10, "any"),
                (60, 3, 4, 7, "one"),
                (60, 3, 4, 7, "nowhere"),
            )
        ),
    ],
)
def test_rows_beyond_the_capacity_are_those_of_a_count_one_after_the_other(T, E, most, group, kind, capacity):
    token_R, expert_R = routing_of(T, E, most, kind)
    limits = {"capacity": capacity, "tokens_per_group": group}
    kept_R = reference.drop_beyond_capacity(token_R, expert_R, num_experts=E, **limits)
    plan = routing_plan(token_R, expert_R, offsets_of(token_R, T), num_experts=E, **limits)
    token_P, row_P, reverse_R, offsets_E1, tiles = reference.routing_plan(
        token_R, kept_R, num_experts=E, tile_rows=plan.tile_rows
    )
    expected = {"token_P": token_P, "row_P": row_P, "reverse_R": reverse_R, "offsets_E1": offsets_E1}
    for name, value in expected.items():
        assert getattr(plan, name).tolist() == value.tolist(), name
    assert [tuple(tile) for tile in plan.schedule.tolist()[: len(tiles)]] == tiles


@pytest.mark.parametrize(
    "B, S, E, K, capacity", [(1, 30, 5, 2, 4), (4, 16, 3, 2, 3), (3, 20, 60, 8, 2), (2, 0, 4, 2, 1)]
)
def test_plan_and_drops_equal_the_layers_own(B, S, E, K, capacity):
    tokens = Tokens.of(torch.zeros(B, S, dtype=torch.int64))
    expert_TK = torch.rand(B * S, E + 1).argsort(dim=1)[:, :K]  # the last of E + 1 is nowhere
    kept_R = apply_capacity(expert_TK, tokens, E, capacity).flatten()
    token_R, weight_R = torch.arange(B * S).repeat_interleave(K), torch.rand(B * S * K)
    token_offsets = torch.arange(B * S + 1) * K
    routing = Routing(token_R, kept_R, weight_R, token_offsets, E, Selection(token_R, kept_R))
    theirs = layer_plan(routing)
    limits = {"capacity": capacity, "tokens_per_group": max(S, 1)}
    ours = routing_plan(token_R, expert_TK.flatten(), token_offsets, num_experts=E, **limits)
    for name in ("row_P", "token_P", "offsets_E1", "counts_E"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
    assert B * S == 0 or (kept_R == E).sum() > (expert_TK == E).sum()


def test_drops_by_hand_and_in_four_more_launches_than_a_plan(launches):
    # two groups of two tokens; expert 0 takes one row of each, and so does expert 1
    token_R, expert_R = torch.tensor([0, 0, 1, 2, 2, 3, 3]), torch.tensor([0, 1, 0, 1, 1, 0, 2])
    limits = {"capacity": 1, "tokens_per_group": 2}
    launches.clear()
    plan = routing_plan(token_R, expert_R, torch.tensor([0, 2, 3, 5, 7]), num_experts=2, **limits)
    ordering = ["plan_count_kernel", "plan_scan_kernel", "plan_place_kernel"]
    assert launches == [*ordering, "plan_drop_kernel", *ordering, "plan_schedule_kernel"]
    assert plan.row_P.tolist() == [0, 5, 1, 3, 2, 4, 6]
    assert plan.offsets_E1.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"capacity": 2}, r"capacity \(2\) and tokens_per_group \(None\) come together"),
        ({"tokens_per_group": 2}, r"capacity \(None\) and tokens_per_group \(2\) come together"),
        ({"capacity": -1, "tokens_per_group": 2}, r"capacity \(-1\) must be at least 0"),
        ({"capacity": 1, "tokens_per_group": 0}, r"tokens_per_group \(0\) at least 1"),
    ],
)
def test_capacities_that_mean_nothing_are_named(limits, message):
    rows = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        routing_plan(rows, rows, torch.arange(5), num_experts=2, **limits)


def test_small_plan_by_hand():
    token_R, expert_R = torch.tensor([0, 0, 1, 3, 3, 3]), torch.tensor([2, 0, 2, 3, 0, 2])
    plan = routing_plan(token_R, expert_R, torch.tensor([0, 2, 3, 3, 6]), num_experts=3)
    assert plan.row_P.tolist() == [1, 4, 0, 2, 5, 3]
    assert plan.token_P.tolist() == [0, 3, 0, 1, 3, 3]
    assert plan.reverse_R.tolist() == [2, 0, 3, 5, 1, 4]
    assert plan.offsets_E1.tolist() == [0, 2, 2, 5]
    assert plan.schedule.tolist() == [[0, 0], [2, 2], [-1, 0]]


@pytest.mark.parametrize("E", [1, 2, 5, 9])
@pytest.mark.parametrize("R", [0, 1, 4, 5, 16, 17, 33])
def test_no_routing_needs_more_tiles_than_the_host_allows_and_one_needs_them_all(R, E):
    def needed(counts) -> int:
        return sum(-(-count // 16) for count in counts)

    worst = [1] * min(E, R)  # one row each, and the rest to one expert
    if worst:
        worst[0] += R - len(worst)
    assert needed(worst) == max_tiles(R, E, 16)
    for _ in range(50):
        counts = torch.bincount(torch.randint(0, E, (R,)), minlength=E).tolist()
        assert needed(counts) <= max_tiles(R, E, 16)


def test_more_tiles_than_sixteen_bits_hold():
    rows = 16 * 40_000
    schedule = schedule_tiles(torch.tensor([0, 5, rows]), rows, 16)
    expected = [[0, 0], *([1, row] for row in range(5, rows, 16))]
    assert schedule[: len(expected)].tolist() == expected
    assert len(schedule) - len(expected) == (schedule[:, 0] == -1).sum() <= 1


def test_first_rows_up_to_the_largest_int32():
    last = 2**31 - 1
    schedule = schedule_tiles(torch.tensor([last - 40, last - 40, last]), 40, 16)
    assert schedule.tolist() == [[1, last - 40], [1, last - 24], [1, last - 8], [-1, 0]]


def test_tiles_are_as_high_as_an_experts_share_of_the_rows():
    heights = [tile_rows(share * 8, 8) for share in (1, 16, 17, 32)]
    assert heights == [16, 16, 32, 32]


def test_too_many_experts_are_refused():
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_experts \(1048576\) must be less than 1048576"):
        routing_plan(nothing, nothing, torch.zeros(1, dtype=torch.int64), num_experts=1 << 20)


@pytest.mark.plain_memory
def test_two_plans_are_equal_and_do_not_depend_on_what_memory_held():
    token_R, expert_R = routing_of(60, 9, 4, "any")
    plans = [routing_plan(token_R, expert_R, offsets_of(token_R, 60), num_experts=9) for _ in range(2)]
    for first, second in zip(*(plan[:-1] for plan in plans), strict=True):
        assert first.tolist() == second.tolist()


def test_plan_traces_without_a_host_synchronisation():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        rows = torch.zeros(96, dtype=torch.int64)
        limits = {"capacity": 3, "tokens_per_group": 8}
        plan = routing_plan(rows, rows, torch.zeros(33, dtype=torch.int64), num_experts=7, **limits)
    assert plan.token_P.shape == plan.reverse_R.shape == (96,)
    assert plan.offsets_E1.shape == (8,)
    assert plan.schedule.shape == (max_tiles(96, 7, plan.tile_rows), 2)
