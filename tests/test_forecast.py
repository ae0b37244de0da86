"""Forecasts against planted curves: the truth where it is exact, calibration where it is noisy, faults where there are any.

The regression under them is compared with numpy's least squares and with a generalised one written out in full.
"""

import json
import math

import numpy as np
import pytest
from curve_files import SIZES, final_gain, rows, write

from moe.analysis.curves import gains, read_curves
from moe.analysis.forecast import fit_forecaster
from moe.analysis.forecast_backtest import backtest
from moe.analysis.mixed import fit_mixed
from moe.cli import main
from moe.errors import DataError


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return write(tmp_path_factory.mktemp("curves") / "c.csv.gz", rows(noise=0.001, shape=0.02))


@pytest.fixture(scope="module")
def result(noisy):
    return backtest(gains(read_curves(noisy), 0.08), "all")


# --------------------------------------------------------------------------------------------------------- regression


def test_without_groups_the_regression_is_numpy_s():
    random = np.random.default_rng(0)
    design_RC = np.stack([np.ones(40), random.normal(size=40)], 1)
    target_R = design_RC @ [1.0, 2.0] + random.normal(size=40)
    fit = fit_mixed(design_RC, target_R[:, None], np.ones(40), np.arange(40))
    beta, squares, *_ = np.linalg.lstsq(design_RC, target_R)
    np.testing.assert_allclose(fit.beta_CS[:, 0], beta)
    # A group of one row cannot be told from the row's own error: only their sum is known.
    np.testing.assert_allclose(fit.variance_S * (1 + fit.ratio_S), squares / 38)
    new_RC = np.array([[1.0, 3.0]])
    error = math.sqrt(
        float(squares[0]) / 38 * (1 + (new_RC @ np.linalg.inv(design_RC.T @ design_RC) @ new_RC.T).item())
    )
    mean, deviation = fit.predict(new_RC, np.ones(1))
    np.testing.assert_allclose((mean.item(), deviation.item()), ((new_RC @ beta).item(), error))


def test_errors_shared_by_groups_are_found_and_widen_the_prediction():
    random = np.random.default_rng(1)
    group_R = np.repeat(np.arange(12), 20)
    design_RC = np.stack([np.ones(240), np.repeat(random.normal(size=12), 20)], 1)
    shared_R = np.repeat(random.normal(size=12), 20)
    target_R = design_RC @ [1.0, 2.0] + shared_R + 0.5 * random.normal(size=240)
    fit = fit_mixed(design_RC, target_R[:, None], np.ones(240), group_R)
    assert fit.ratio_S[0] in (2.0, 4.0)  # var(shared) / var(own) is 4
    covariance = np.eye(240) + fit.ratio_S[0] * (group_R[:, None] == group_R)
    inverse = np.linalg.inv(covariance)
    expected = np.linalg.inv(design_RC.T @ inverse @ design_RC) @ design_RC.T @ inverse @ target_R
    np.testing.assert_allclose(fit.beta_CS[:, 0], expected)
    assert fit.predict(design_RC[:1], np.ones(1))[1].item() > 0.7  # the rows' own part is 0.5


# ----------------------------------------------------------------------------------------------------------- forecasts


def test_curves_without_noise_are_forecast_exactly(tmp_path):
    found = gains(read_curves(write(tmp_path / "c.csv", rows())), 0.08)
    forecaster = fit_forecaster(found.take(found.size_R < 6e8), 6e8)
    new = found.take(found.size_R == 6e8)
    middle_R = forecaster.final(new.gain_RS[:, 0], new.size_R, new.experts_R)[:, 1]
    np.testing.assert_allclose(middle_R, [final_gain(6e8, e) for e in new.experts_R], rtol=1e-6)


def test_intervals_cover_and_alarms_keep_their_rate_on_noisy_curves(result):
    pooled = result["pooled"]
    assert pooled["runs"] == 70
    assert pooled["median_error"] < 0.06
    assert 0.8 <= pooled["coverage"] <= 1.0
    assert pooled["false_alarms"] <= 0.07
    assert pooled["faults"]["4"]["detected"] >= 0.93
    assert 0 < pooled["faults"]["4"]["median_delay"] <= 0.2


def test_the_largest_size_is_calibrated_on_reaching_up(result):
    folds = {size["held_out"]: size["calibration_folds"] for size in result["sizes"]}
    assert folds == {"15M": "larger", "40M": "others", "100M": "others", "250M": "others", "600M": "smaller"}


def test_a_fault_is_tried_only_where_its_end_was_trained(result):
    runs = {run["experts"]: run["faults"] for run in result["sizes"][0]["per_run"]}
    assert runs[2] == {"2": None, "4": None, "8": None}
    assert runs[8]["2"] is not None and runs[8]["4"] is not None and runs[8]["8"] is None


def test_a_wider_confidence_gives_wider_intervals_and_a_rarer_alarm_a_lower_threshold(noisy):
    found = gains(read_curves(noisy), 0.08)
    narrow, wide = (fit_forecaster(found, 1e8, confidence=c, false_alarm_rate=a) for c, a in ((0.5, 0.2), (0.95, 0.05)))
    assert narrow.calibration.multiplier < wide.calibration.multiplier
    assert narrow.calibration.threshold > wide.calibration.threshold


def test_gains_that_begin_behind_dense_are_forecast_as_they_are(tmp_path):
    """Every gain is lowered by 0.9 of its final value: a line in the same columns, and below 0 at the anchor."""
    lines = rows(noise=1e-4)
    for row in lines:
        if row["num_experts"] > 1:
            row["loss_validation"] += 0.9 * final_gain(row["dense_parameter_count"], row["num_experts"])
    past = gains(read_curves(write(tmp_path / "c.csv", lines)), 0.2)
    assert (past.gain_RS[:, 0] < 0).all() and (past.gain_RS[:, -1] > 0).all()
    forecaster = fit_forecaster(past.take(past.size_R < 6e8), 6e8)
    assert (
        forecaster.scale == "linear"
        and fit_forecaster(gains(read_curves(write(tmp_path / "d.csv", rows())), 0.2), 1e8).scale == "log"
    )
    new = past.take(past.size_R == 6e8)
    truth_R = np.array([0.1 * final_gain(6e8, experts) for experts in new.experts_R])
    low_R, middle_R, high_R = forecaster.final(new.gain_RS[:, 0], new.size_R, new.experts_R).T
    np.testing.assert_allclose(middle_R, truth_R, atol=0.005)
    assert np.mean((low_R < truth_R) & (truth_R < high_R)) >= 0.8
    healthy_RS = forecaster.deviations(new.gain_RS[:, 0], new.size_R, new.experts_R, new.gain_RS[:, 1:])
    lost_RS = forecaster.deviations(new.gain_RS[:, 0], new.size_R, new.experts_R, new.gain_RS[:, 1:] - 0.05)
    assert np.mean(healthy_RS.min(1) < forecaster.calibration.threshold) <= 0.2
    assert lost_RS.min(1).max() < forecaster.calibration.threshold


def test_a_rate_that_the_past_runs_cannot_show_never_alarms(noisy):
    forecaster = fit_forecaster(gains(read_curves(noisy), 0.08), 1e8, false_alarm_rate=0.001)
    assert forecaster.calibration.threshold == -math.inf


def test_too_few_past_runs_are_refused(noisy):
    found = gains(read_curves(noisy), 0.08)
    with pytest.raises(DataError, match="needs 19 finished sparse runs"):
        fit_forecaster(found.take(found.size_R < 1e8), 1e8)
    with pytest.raises(DataError, match="at least 2 other sizes and numbers of experts"):
        fit_forecaster(found.take(found.experts_R == 8), 1e8)


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_prints_what_the_function_returns(noisy, capsys):
    assert main(["forecast", "backtest", str(noisy), "--hold-out", "600M", "--fit-on", "smaller", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = backtest(gains(read_curves(noisy), 0.08), "600M", fit_on="smaller")
    assert printed == json.loads(json.dumps(expected))
    assert printed["sizes"][0]["fitted_sizes"] == list(SIZES)[:-1]
    assert printed["pooled"]["runs"] == len(printed["sizes"][0]["per_run"]) == 14


def test_the_table_holds_the_same_figures(noisy, capsys):
    assert main(["forecast", "backtest", str(noisy), "--hold-out", "100M"]) == 0
    size = backtest(gains(read_curves(noisy), 0.08), "100M")["sizes"][0]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("100M"))
    assert line.split()[1:4] == ["14", f"{size['median_error']:.1%}", f"{size['coverage']:.0%}"]
