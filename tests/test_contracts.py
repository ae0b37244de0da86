"""moe/analysis/contracts.py on losses whose answer is worked by hand: power laws with a known size, curves that cross where they
were made to.
"""

import math

import numpy as np
import pytest

from moe.analysis.contracts import (
    CONTRACTS,
    Arm,
    crossover,
    decompose,
    effective_size,
    interpolated,
    judge,
    log_ratio,
    mean_curve,
    net_speed,
)
from moe.analysis.paired import t_interval
from moe.errors import UserError

SHIFT_S = np.array([0.0, 0.02, -0.01])
"""Seeds differ by more than the effects, and alike in every arm: pairing takes it out."""


def arm(name, loss, **resources):
    return Arm(name, np.asarray(loss) + SHIFT_S, resources)


def law(size):
    """Dense loss 4·N^-0.1 of every seed, so that ln L is a line in ln N."""
    return 4 * size**-0.1 * np.exp(SHIFT_S)


def test_between_the_twins_a_power_law_is_found_exactly():
    found = interpolated(2e6, (1e6, 8e6), law(1e6), law(8e6))
    assert found == pytest.approx(law(2e6), rel=1e-12)
    beyond = interpolated(3e7, (1e6, 8e6), law(1e6), law(8e6))
    assert beyond == pytest.approx(law(3e7), rel=1e-12)


@pytest.fixture
def arms():
    """A sparse model of 1M active of 8M parameters that is as good as a dense one of 2M."""
    sparse = Arm(
        "sparse",
        law(2e6),
        {"active_parameters": 1e6, "flops": 1e6, "total_parameters": 8e6, "memory": 4e6, "seconds": 1.5, "joules": 3.0},
    )
    return sparse, dense(1e6), dense(8e6)


def dense(size):
    """A dense model: everything goes with its size, an energy of two joules per second."""
    same = dict.fromkeys(("active_parameters", "flops", "total_parameters", "memory"), size)
    return Arm("dense", law(size), {**same, "seconds": size / 1e6, "joules": 2 * size / 1e6})


def test_every_contract_compares_with_the_dense_model_of_that_resource(arms):
    expected = {  # dense size with the sparse model's resource, and the verdict against 2M
        "active_parameters": (1e6, "win", "the active twin itself"),
        "flops": (1e6, "win", "the active twin itself"),
        "total_parameters": (8e6, "loss", "the total twin itself"),
        "memory": (4e6, "loss", "the twins, interpolated between them"),
        "seconds": (1.5e6, "win", "the twins, interpolated between them"),
        "joules": (1.5e6, "win", "the twins, interpolated between them"),
    }
    for contract, (size, verdict, how) in expected.items():
        found = judge(contract, *arms)
        assert found["dense_loss"] == pytest.approx(law(size)), contract
        assert (found["verdict"], found["from"]) == (verdict, how), contract
        gain = t_interval((law(size) - law(2e6)).tolist())
        assert [found["gain"][key] for key in ("mean", "low", "high")] == pytest.approx(
            [gain.mean, gain.low, gain.high]
        )
    assert judge("dollars", *arms)["why"] == "a run does not know this resource"
    assert list(CONTRACTS)[:-1] == list(expected)


def test_a_gain_within_the_noise_of_the_seeds_is_undecided():
    sparse = Arm("sparse", np.array([1.00, 1.02, 0.98]), {"flops": 1.0})
    active = Arm("dense", np.array([1.01, 1.01, 0.99]), {"flops": 1.0})
    found = judge("flops", sparse, active, None)
    assert found["verdict"] == "undecided" and found["gain"]["low"] < 0 < found["gain"]["high"]


def test_without_the_total_twin_only_the_active_one_is_compared(arms):
    sparse, active, _ = arms
    assert judge("flops", sparse, active, None)["verdict"] == "win"
    assert judge("memory", sparse, active, None)["why"] == "needs the dense twin of equal total parameters"
    flat = Arm("total", law(8e6), {"memory": 1e6})
    assert "no curve between them" in judge("memory", sparse, active, flat)["why"]
    outside = judge("seconds", Arm("sparse", law(2e6), {"seconds": 20.0}), active, dense(8e6))
    assert outside["from"] == "the twins, extrapolated beyond them"
    far = judge("seconds", Arm("sparse", law(2e6), {"seconds": 23.0}), active, dense(8e6))
    assert far["verdict"] is None and far["why"] == "23 lies too far beyond the twins' 1 and 8"


def test_effective_dense_size_is_the_size_on_the_curve(arms):
    found = effective_size(*arms)
    assert found["parameters"] == pytest.approx(2e6) and found["over_active"] == pytest.approx(2.0)
    assert (
        found["over_total"] == pytest.approx(0.25)
        and found["low"] <= 2e6 * 1.000001
        and found["high"] >= 2e6 * 0.999999
    )
    sparse, active, _ = arms
    worse = Arm("total", law(0.5e6), {"total_parameters": 8e6})
    assert effective_size(sparse, active, worse)["parameters"] is None


def test_net_speed_is_multiplier_over_tax_and_no_number_where_one_is_inside():
    multiplier = t_interval([math.log(3.0)] * 3)
    tax = log_ratio([1.5, 1.5], [1.0, 1.0])
    sure = net_speed(multiplier, tax)
    assert sure["net"] == pytest.approx(2.0) and sure["verdict"] == "win"
    wide = t_interval([math.log(1.1), math.log(2.0), math.log(1.4)])
    unsure = net_speed(wide, tax)
    assert unsure["net"] is None and unsure["low"] < 1 < unsure["high"] and unsure["verdict"] == "undecided"
    # half-widths 0.3 and 0.4 make 0.5
    left, right = (t_interval([mean - d, mean + d]) for mean, d in ((1.0, 0.1), (0.2, 0.1)))
    both = net_speed(left, right)
    half = math.hypot(*(one.mean - (one.low or 0.0) for one in (left, right)))
    assert (both["low"], both["high"]) == pytest.approx((math.exp(0.8 - half), math.exp(0.8 + half)))
    assert net_speed(t_interval([0.5]), tax)["net"] is None


def test_the_crossover_is_where_the_last_change_of_sign_is():
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    dense_curve = (x, np.array([4.0, 3.0, 2.0, 1.0]))
    # behind by 0.5 at 10, ahead by 0.5 at 100: equal halfway between in ln x
    found = crossover((x, np.array([3.0, 3.5, 1.5, 0.5])), dense_curve)
    assert found["state"] == "crosses" and found["at"] == pytest.approx(10**1.5)
    assert crossover((x, dense_curve[1] - 0.1), dense_curve) == {"state": "ahead", "at": None}
    assert crossover((x, np.array([3.0, 2.0, 1.0, 1.1])), dense_curve) == {"state": "behind", "at": None}
    # at another speed: the sparse model takes ten times as long for the same tokens, and gets to the same losses
    slow = crossover((10 * x, dense_curve[1] - 1.5), dense_curve)
    assert slow == {"state": "ahead", "at": None}
    with pytest.raises(UserError, match="share fewer than two points"):
        crossover((1e6 * x, dense_curve[1]), dense_curve)


def test_curves_of_seeds_are_averaged_only_at_the_same_steps():
    x = np.array([1.0, 2.0])
    assert mean_curve([(x, np.array([4.0, 2.0])), (x, np.array([2.0, 1.0]))])[1] == pytest.approx([3.0, 1.5])
    near = mean_curve([(x, x), (x * 1.004, x)])[0]  # batches of another seed hold a few tokens more
    assert near == pytest.approx(x * 1.002)
    for other in (x + 1, np.array([1.0, 2.0, 3.0])):
        with pytest.raises(UserError, match="evaluated at different steps"):
            mean_curve([(x, x), (other, other)])


def test_the_gain_splits_into_capacity_and_routing():
    found = decompose(arm("sparse", 2.0), arm("dense", 2.5), arm("hash", 2.2))
    assert found["gain"]["mean"] == pytest.approx(0.5)
    assert found["capacity"]["mean"] == pytest.approx(0.3) and found["routing"]["mean"] == pytest.approx(0.2)
    assert found["share"] == pytest.approx(0.6) and found["twin"] == "hash"
    noisy = Arm("dense", np.array([2.5, 1.5, 2.1]), {})
    assert decompose(arm("sparse", 2.0), noisy, arm("hash", 2.2))["share"] is None
