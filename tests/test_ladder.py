"""Ladders with a known truth: a line is continued exactly, a planted bend is over-stated and mostly corrected."""

import json

import numpy as np
import pytest
from curve_files import final_gain, rows, write

from moe.analysis.curves import final_gains, read_curves
from moe.analysis.ladder import Ladder, backtest, measure_optimism, naive, predict
from moe.cli import main
from moe.errors import DataError

RUNGS = np.array([1e7, 3e7, 9e7, 27e7, 81e7])
EXPERTS = (2, 4, 8, 16, 32)


def ladder(bend: float = 0.0, noise: float = 0.0) -> Ladder:
    """Gains that fall linearly in log size, less `bend` for each squared step of the ladder."""
    size_R, experts_R = (grid.ravel() for grid in np.meshgrid(RUNGS, EXPERTS))
    steps_R = np.log(size_R / RUNGS[0]) / np.log(3)
    gain_R = 0.1 * np.log(experts_R) * (1 - 0.04 * steps_R - bend * steps_R**2)
    gain_R += noise * np.random.default_rng(0).normal(size=gain_R.size)
    return Ladder(size_R, experts_R, np.full(gain_R.size, "topk"), 12 * size_R**-0.08, gain_R)


def split(whole: Ladder, top: float) -> tuple[Ladder, Ladder]:
    return whole.take(whole.size_R < top), whole.take(whole.size_R == top)


def test_a_line_is_continued_exactly_and_has_no_optimism():
    below, new = split(ladder(), RUNGS[-1])
    np.testing.assert_allclose(predict(below, RUNGS[-1], new.router_R, new.experts_R, "linear"), new.gain_R)
    assert measure_optimism(below, "linear").share == pytest.approx(0, abs=1e-9)


def test_the_naive_forecast_is_the_largest_rung_with_those_experts():
    below, new = split(ladder(), RUNGS[-1])
    without = below.take((below.size_R < RUNGS[-2]) | (below.experts_R != 8))
    found = dict(zip(new.experts_R, naive(without, new.router_R, new.experts_R), strict=True))
    assert found[4] == below.gain_R[(below.size_R == RUNGS[-2]) & (below.experts_R == 4)]
    assert found[8] == below.gain_R[(below.size_R == RUNGS[-3]) & (below.experts_R == 8)]


def test_optimism_of_one_back_test_is_the_miss_over_what_was_predicted():
    # Three rungs: one back-test, the third from a line through the first two, which misses the bend alone.
    predicted, truth = 1 - 2 * (0.04 + 0.01), 1 - 2 * 0.04 - 4 * 0.01
    one = ladder(bend=0.01).take(ladder().size_R < 2e8)
    names = ("size_R", "experts_R", "dense_R", "gain_R")
    size_R, experts_R, dense_R, gain_R = (np.tile(getattr(one, name), 2) for name in names)
    wide = Ladder(size_R, experts_R, np.repeat(["a", "b"], one.size_R.size), dense_R, gain_R)
    found = measure_optimism(wide, "linear")
    assert found.misses == 10
    assert found.share == pytest.approx((predicted - truth) / (predicted * np.log(3)))
    assert found.spread == pytest.approx(0, abs=1e-9)


def test_a_bend_is_over_stated_and_the_correction_takes_most_of_it():
    below, new = split(ladder(bend=0.01, noise=0.001), RUNGS[-1])
    guess_R = predict(below, RUNGS[-1], new.router_R, new.experts_R, "linear")
    optimism = measure_optimism(below, "linear")
    corrected_R3 = optimism.correct(guess_R, np.log(3))
    before, after = (np.sqrt(np.mean((x - new.gain_R) ** 2)) for x in (guess_R, corrected_R3[:, 1]))
    assert optimism.share > 0.02
    assert after < 0.7 * before
    np.testing.assert_allclose(corrected_R3[:, 2] - corrected_R3[:, 0], 2 * np.log(3) * optimism.spread)


def test_too_short_or_too_thin_a_ladder_is_refused():
    whole = ladder()
    with pytest.raises(DataError, match="3 sizes are needed, found 2"):
        measure_optimism(whole.take(whole.size_R < 5e7), "linear")
    with pytest.raises(DataError, match="could be checked on 4 runs of the ladder, 9 are needed"):
        measure_optimism(whole.take((whole.size_R < 4e8) & (whole.experts_R < 8)), "linear")


def test_the_command_prints_what_the_function_returns(tmp_path, capsys):
    path = write(tmp_path / "c.csv", rows(noise=0.0005))
    assert main(["ladder", "backtest", str(path), "--target", "600M", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(backtest(final_gains(read_curves(path)), "600M")))
    assert printed["ladder"] == ["15M", "40M", "100M", "250M"]
    assert set(printed["forms"]) == {"naive", "linear", "law"}
    # The file's truth is the linear form, so only noise is left of it; "as on the largest rung" is off by a known amount.
    assert printed["forms"]["linear"]["after"]["rms"] < 0.004
    off = np.mean([final_gain(2.5e8, run["experts"]) - run["gain"] for run in printed["per_run"]])
    assert printed["forms"]["naive"]["before"]["mean"] == pytest.approx(off, abs=1e-3)
    assert main(["ladder", "backtest", str(path), "--target", "600M"]) == 0
    assert f"{printed['forms']['linear']['after']['rms']:.4f}" in capsys.readouterr().out


def test_laws_are_printed(tmp_path, capsys):
    path = write(tmp_path / "c.csv", rows())
    assert main(["ladder", "fit", str(path)]) == 0
    assert "N^-0.0800" in capsys.readouterr().out
    assert main(["ladder", "fit", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["routers"]["Hash"]["runs"] == 35
