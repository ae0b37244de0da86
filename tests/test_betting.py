"""The e-process against simulated streams whose mean is known: false alarms, delays, and wealth worked by hand."""

import math

import numpy as np
import pytest

from moe.analysis.betting import STAKES, log_wealth, monitor
from moe.errors import UserError

RUNS, SEQUENCES, PROMISE, RATE = 2000, 400, 0.10, 0.05
DRAWS = {
    "normal": lambda random, shape: random.normal(0, 0.1, shape),
    "rare large losses": lambda random, shape: np.where(random.random(shape) < 0.1, -0.45, 0.05),
}


@pytest.mark.parametrize("name", DRAWS)
def test_healthy_runs_watched_all_the_time_alarm_at_most_at_the_nominal_rate(name):
    random = np.random.default_rng(0)
    gain_RN = PROMISE + DRAWS[name](random, (RUNS, SEQUENCES))  # exactly at the promise: the worst case of keeping it
    alarms = np.mean(log_wealth(PROMISE, gain_RN, 0.6).max(1) >= -math.log(RATE))
    assert alarms <= RATE
    # The same runs 0.1 nats below the promise: the alarm is no mere silence.
    assert np.mean(log_wealth(PROMISE, gain_RN[:200] - 0.1, 0.6).max(1) >= -math.log(RATE)) > 0.99


def test_wealth_is_the_mean_of_products_of_bets():
    difference_N = np.array([0.3, -0.1, 0.2])
    by_hand = [np.mean([np.prod(1 + s * (0.1 - difference_N[:n]) / 0.5) for s in STAKES]) for n in (1, 2, 3)]
    found = monitor(0.1, difference_N, bound=0.5)
    assert found.wealth_N == pytest.approx(by_hand)
    assert found.alarm is None and found.clipped == 0


def test_expected_wealth_at_the_promise_is_one():
    # Two equally likely outcomes around the promise: the mean over all 2^6 streams is the expectation itself.
    streams = np.array([[0.4 if bit >> i & 1 else -0.2 for i in range(6)] for bit in range(64)])
    assert np.exp(log_wealth(0.1, streams, 0.5)).mean(0) == pytest.approx(np.ones(6))


def test_a_smaller_shortfall_takes_longer_to_see():
    random = np.random.default_rng(1)
    delays = [monitor(PROMISE, random.normal(mean, 0.1, 3000), bound=0.6).alarm for mean in (0.0, 0.05, 0.08)]
    assert None not in delays
    assert delays == sorted(delays)


def test_a_promise_may_change_from_sequence_to_sequence():
    steps_N = np.linspace(0.05, 0.15, 50)
    random_N = np.random.default_rng(2).normal(0, 0.1, 50)
    moving, fixed = monitor(steps_N, steps_N + random_N, bound=1), monitor(0.0, random_N, bound=1)
    assert moving.wealth_N == pytest.approx(fixed.wealth_N)


def test_clipping_makes_the_evidence_smaller():
    gains_N = np.array([0.1, -3.0])
    clipped = monitor(0.1, gains_N, bound=0.5)
    assert clipped.clipped == 1
    assert clipped.wealth_N[1] == pytest.approx(np.mean(1 + STAKES))
    assert clipped.wealth_N[1] < monitor(0.1, gains_N, bound=4).wealth_N[1] * 4


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((0.1, [0.9], 0.5, 0.05), "gains 0.8 more than the promise, above the bound (0.5)"),
        ((0.1, [math.nan], 0.5, 0.05), "must be finite"),
        ((0.1, [0.1], 0.0, 0.05), "bound (0) must be positive"),
        ((0.1, [0.1], 0.5, 1.5), "false_alarm_rate (1.5)"),
    ],
)
def test_what_would_make_the_rate_untrue_is_refused(arguments, says):
    promise, gains, bound, rate = arguments
    with pytest.raises(UserError) as error:
        monitor(promise, np.array(gains), bound=bound, false_alarm_rate=rate)
    assert says in str(error.value)
