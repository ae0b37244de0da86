"""The law with an annealing term: planted constants found again, its areas against sums by hand, curves moved between schedules.

Synthetic curves obey the law exactly, so what a translation should give is known.
"""

import math

import numpy as np
import pytest
from curve_files import rows, write

from moe.analysis.annealing import areas, fit_laws, read_schedule, relative_rates, write_schedule
from moe.analysis.curves import gains, read_curves
from moe.analysis.translate import stretched, to_schedule
from moe.config.schema import Cosine, Wsd
from moe.errors import DataError

T = 1000
COSINE, WSD = Cosine(warmup_steps=50, final_fraction=0.1), Wsd(warmup_steps=50, decay_steps=200)
STEPS = np.arange(60, T + 1, 20)


def planted(schedule, floor=2.0, scale=0.5, power=0.4, anneal=0.3, memory=0.03, noise=0.0, seed=0):
    """A curve written out: sums over all steps, and each fall of the rate forgotten exponentially."""
    rate_T = relative_rates(schedule, T)
    stay, momentum, area, fallen, loss_T = math.exp(-1 / (memory * T)), 0.0, 0.0, 0.0, []
    for t in range(T):
        drop = rate_T[t - 1] - rate_T[t] if t > int(np.argmax(rate_T)) else 0.0
        momentum = stay * momentum + drop
        area, fallen = area + rate_T[t] / T, fallen + (1 - stay) * momentum
        loss_T.append(floor + scale * area**-power - anneal * fallen)
    return np.array(loss_T) + noise * np.random.default_rng(seed).normal(size=T)


@pytest.mark.parametrize("schedule", [COSINE, WSD], ids=["cosine", "wsd"])
@pytest.mark.parametrize("memory", [0.01, 0.1])
def test_planted_constants_are_found_within_one_per_cent(schedule, memory):
    loss_T = planted(schedule, memory=memory)
    (law,) = fit_laws([(relative_rates(schedule, T), STEPS, loss_T[STEPS - 1])])
    assert law.memory == memory and law.error < 1e-6
    assert (law.floor, law.scale, law.power, law.anneal) == pytest.approx((2.0, 0.5, 0.4, 0.3), rel=0.01)


def test_constants_are_found_in_noisy_curves_of_both_schedules():
    curves = [
        (relative_rates(s, T), STEPS, planted(s, noise=2e-4, seed=i)[STEPS - 1]) for i, s in enumerate((COSINE, WSD))
    ]
    for law in fit_laws(curves):
        assert (law.floor, law.scale, law.power, law.anneal) == pytest.approx((2.0, 0.5, 0.4, 0.3), rel=0.02)


def test_areas_of_a_constant_rate_and_of_one_fall():
    assert areas(np.ones(4), 0.1)[:, -1] == pytest.approx([1.0, 0.0])
    one_fall = np.where(np.arange(T) < 500, 1.0, 0.0)
    S1_T, S2_T = areas(one_fall, 0.01)
    assert S1_T[-1] == pytest.approx(0.5) and S2_T[499] == 0 and S2_T[-1] == pytest.approx(1.0)
    assert S2_T[500 + 9] == pytest.approx(1 - math.exp(-10 / 10), rel=1e-6)  # one memory (10 steps) after the fall
    rising = np.minimum(np.arange(1, T + 1) / 100, 1.0)
    assert areas(rising, 0.01)[1].max() == 0, "a warm-up is no annealing"


def curve_file(path, schedule, gain=0.1):
    """Five sizes whose runs obey the law under a schedule; sparse ones have a lower floor and anneal more."""
    lines = rows()
    for row in lines:
        step, E = int(row["step"] / 100), row["num_experts"]
        better = gain * math.log(E) if E > 1 else 0.0
        size = math.log(row["dense_parameter_count"] / 1e8)
        row["step"], row["schedule"] = step, write_schedule(schedule)
        if step:
            key = (schedule.name, round(size, 6), E)
            if key not in CACHE:
                CACHE[key] = planted(schedule, floor=2 - 0.1 * size - 0.5 * better, anneal=0.3 + 0.5 * better)
            row["loss_validation"] = CACHE[key][step - 1]
    return write(path, lines, (*lines[0], "schedule") if "schedule" not in lines[0] else tuple(lines[0]))


CACHE: dict = {}


def test_past_runs_of_another_schedule_are_translated(tmp_path):
    cosine, wsd = (read_curves(curve_file(tmp_path / f"{s.name}.csv", s)) for s in (COSINE, WSD))
    truth = gains(wsd, 0.2)
    plain, moved = gains(cosine, 0.2), gains(to_schedule(cosine, stretched(WSD, T, 5 * T), 5 * T), 0.2)
    middle = truth.progress_S.size // 2
    assert np.abs(plain.gain_RS - truth.gain_RS)[:, middle].max() > 0.02, "the schedules do differ in the middle"
    np.testing.assert_allclose(moved.gain_RS, truth.gain_RS, atol=5e-4)
    same = to_schedule(cosine, stretched(COSINE, T, 5 * T), 5 * T)
    assert all(new is old for new, old in zip(same, cosine, strict=True))


def test_schedules_are_written_and_read_and_wrong_ones_refused(tmp_path):
    for schedule in (COSINE, WSD):
        assert read_schedule(write_schedule(schedule), "here") == schedule
    for text in ("linear", "wsd warmup_steps=5", "cosine warmup=5", "cosine warmup_steps=x"):
        with pytest.raises(DataError, match=r"schedule"):
            read_schedule(text, "line 3")
    lines = rows(sizes=("15M", "40M", "100M"))
    for row in lines[:50]:
        row["schedule"] = write_schedule(COSINE)
    curves = read_curves(write(tmp_path / "half.csv", lines, (*lines[-1], "schedule")))
    with pytest.raises(DataError, match="does not tell its schedule: fill the column"):
        to_schedule(curves, WSD, T)
