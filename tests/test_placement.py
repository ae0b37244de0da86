"""Placement of experts against every possible one on small sizes, and a run that goes on with its experts elsewhere."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from test_layouts import torchrun

from moe.parallel.placement import imbalance, inverse, pack, pack_copies, replicate


def best_of_all(load_E, ranks: int) -> float:
    """The least imbalance of any order."""
    return min(imbalance(load_E, order, ranks) for order in itertools.permutations(range(len(load_E))))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ranks", [2, 3])
def test_packing_is_near_the_best_of_all_orders(seed, ranks):
    load_E = np.random.default_rng(seed).pareto(1.2, 6).tolist()
    order = pack(load_E, ranks)
    assert sorted(order) == list(range(6))
    assert imbalance(load_E, order, ranks) <= 1.05 * best_of_all(load_E, ranks)


def test_a_hand_worked_packing():
    # 9 + 1 and 8 + 2 are both 10 of 20
    assert imbalance([9, 8, 1, 2], [0, 1, 2, 3], 2) == pytest.approx(1.7)
    order = pack([9, 8, 1, 2], 2)
    assert order == [0, 2, 1, 3]
    assert imbalance([9, 8, 1, 2], order, 2) == pytest.approx(1.0)


def test_packing_many_experts_with_a_long_tail():
    load_E = (1 / np.arange(1, 129)).tolist()
    order = pack(load_E, 16)
    assert sorted(order) == list(range(128))
    # no placement can be below what the hottest expert and its seven lightest companions weigh
    floor = (load_E[0] + sum(sorted(load_E)[:7])) * 16 / sum(load_E)
    assert imbalance(load_E, order, 16) == pytest.approx(max(floor, 1.0), rel=0.01)


def test_equal_loads_stay_where_they_are():
    assert pack([1.0] * 8, 4) == list(range(8))
    assert pack([0.0] * 4, 1) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_replication_makes_the_fullest_copy_as_light_as_any_choice(seed):
    load_E = np.random.default_rng(seed).pareto(1.0, 4).tolist()
    copies = replicate(load_E, 9)
    assert sum(copies) == 9
    choices = (c for c in itertools.product(range(1, 7), repeat=4) if sum(c) == 9)
    best = min(max(load / n for load, n in zip(load_E, c, strict=True)) for c in choices)
    assert max(load / n for load, n in zip(load_E, copies, strict=True)) == pytest.approx(best)


def test_copies_of_a_hot_expert_even_out_what_no_order_can():
    load_E = [100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert 100 * 3 / sum(load_E) > 2.8, "its rank alone, wherever the others are"
    placed = pack_copies(load_E, 3, 9)
    assert len(placed) == 9 and set(placed) == set(range(7))
    assert imbalance(load_E, placed, 3) < 1.1


def test_slots_and_experts_invert():
    order = [3, 0, 2, 1]
    assert [order[slot] for slot in inverse(order)] == [0, 1, 2, 3]


def test_a_run_goes_on_with_its_experts_on_other_ranks():
    for case, found in json.loads(torchrun(2, str(Path(__file__).parent / "placement_cases.py"))).items():
        assert found["orders"] == [[0, 2, 1, 3]] * 2, case
        assert found["bitwise"] is True, case
        assert found["tensors"] > 60, case
        assert found["losses"] < 1e-12, case
