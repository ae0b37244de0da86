"""From the first per cent of a sparse run: its final gain over dense, and an alarm when the gain falls behind.

Learnt from healthy finished runs. For each later share of training s, with g the gain over dense at the anchor s0,
N active parameters and E experts:

    log(gain(s) / g) = b0(s) + b1(s) log N + b2(s) log g + b3(s) log E + error shared by a size + error of the run

(`mixed.py`). Where past runs have been behind dense (small models early in training), a logarithm says nothing, and gains
themselves take its place: gain(s) - g, with g in its own column.

How far such predictions miss is not taken from the fit but measured: every size is predicted from other sizes, as the new
size will be, and the quantiles of what comes out, in predicted standard deviations, are the interval and the alarm's
threshold (split conformal, Vovk et al. 2005). The alarm looks at the smallest standardised deviation of
the whole run, so that its error rate is per run, not per look.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moe.analysis.curves import Gains
from moe.analysis.mixed import MixedFit, fit_mixed
from moe.errors import DataError

SIZE_UNIT = 1e8
GAIN_FLOOR = 1e-3
"""Nats: a gain below it is taken for it in logarithms; such a run is barely ahead, and its interval is wide."""
LOOK_NOISE = 0.0028
"""Nats: deviation of one gain by chance, two runs of seed deviation 0.0020 (three dense seeds of Clark et al. at 4 %)."""
RELATIVE_ERROR = 0.035
"""Typical deviation of log final gain from its forecast; only its ratio to LOOK_NOISE matters, as a weight of runs."""
COLUMNS = 4
MIN_RUNS = 19
"""Calibration runs below which no rank of theirs is a 5 % quantile: 1 / 0.05 - 1."""
BEYOND = 1.1
"""A size this many times the largest past one, or this much below the smallest, is not one of theirs."""
Scale = Literal["log", "linear"]
BEHIND = 0.05
"""Share of past runs with a look at or below GAIN_FLOOR above which gains are taken as they are."""
Folds = Literal["others", "smaller", "larger"]


@dataclass(frozen=True)
class Calibration:
    """What predicting known runs as if they were new has shown, in predicted standard deviations."""

    folds: Folds
    """Each size was predicted from all other sizes, from all smaller ones, or from all larger ones."""
    runs: int
    multiplier: float
    """Half-width of the final gain's interval."""
    confidence: float
    threshold: float
    """Alarm below it."""
    false_alarm_rate: float
    """Per run, over all its looks."""


@dataclass(frozen=True)
class Forecaster:
    """A fitted and calibrated forecast for runs of a given size."""

    progress_S: np.ndarray
    """Shares of training that are predicted, the last is 1."""
    anchor: float
    fit: MixedFit
    calibration: Calibration
    scale: Scale
    """Whether logarithms of gains were fitted, or gains."""

    def paths(self, gain_R: np.ndarray, size_R: np.ndarray, experts_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation [R, S] of log gain (linear: of gain) over `progress_S`, from the gain at the anchor in nats."""
        return _predict(self.fit, gain_R, size_R, experts_R, self.scale)

    def final(self, gain_R: np.ndarray, size_R: np.ndarray, experts_R: np.ndarray) -> np.ndarray:
        """(low, middle, high) [R, 3] of the final gain in nats."""
        mean_RS, deviation_RS = self.paths(gain_R, size_R, experts_R)
        half_R = self.calibration.multiplier * deviation_RS[:, -1]
        ends_R3 = mean_RS[:, -1:] + half_R[:, None] * np.array([-1.0, 0.0, 1.0])
        return np.exp(ends_R3) if self.scale == "log" else ends_R3

    def deviations(
        self, gain_R: np.ndarray, size_R: np.ndarray, experts_R: np.ndarray, later_RS: np.ndarray
    ) -> np.ndarray:
        """Standardised deviations [R, S] of gains at `progress_S` from their forecast; alarm below the threshold."""
        mean_RS, deviation_RS = self.paths(gain_R, size_R, experts_R)
        return _standardised(later_RS, mean_RS, deviation_RS, self.scale)


def fit_forecaster(
    past: Gains, target_size: float, *, confidence: float = 0.9, false_alarm_rate: float = 0.05
) -> Forecaster:
    """Fit past runs and calibrate for a run of `target_size` active parameters; column 0 of the gains is the anchor.

    Calibrated on each past size predicted from all others. A size beyond the range of the past ones is calibrated on each
    predicted from only smaller (or larger) ones as well, and the worse of the two counts: reaching out is never easier
    than filling in. Raises DataError for fewer than MIN_RUNS calibration runs.
    """
    sizes, scale = np.unique(past.size_R), _scale(past)
    above, below = target_size > BEYOND * sizes[-1], target_size < sizes[0] / BEYOND
    edge: Folds | None = "smaller" if above else "larger" if below else None
    calibrations = []
    for folds in ("others", edge):
        misses = _cross_predictions(past, folds, scale) if folds is not None else []
        if sum(final_R.size for final_R, _ in misses) >= MIN_RUNS:
            assert folds is not None
            calibrations.append(_calibrate(misses, folds, confidence, false_alarm_rate))
    if not calibrations:
        count = sum(final_R.size for final_R, _ in _cross_predictions(past, "others", scale))
        raise DataError(
            f"a calibrated forecast needs {MIN_RUNS} finished sparse runs, each predicted from at least 2 other sizes and "
            f"numbers of experts; "
            f"found {count} ({past.size_R.size} runs of {sizes.size} sizes): add past runs."
        )
    calibration = replace(
        calibrations[-1],
        multiplier=max(one.multiplier for one in calibrations),
        threshold=min(one.threshold for one in calibrations),
    )
    return Forecaster(past.progress_S[1:], float(past.progress_S[0]), _fit(past, scale), calibration, scale)


def _calibrate(
    misses: list[tuple[np.ndarray, np.ndarray]], folds: Folds, confidence: float, rate: float
) -> Calibration:
    """Conformal quantiles of what `_cross_predictions` found.

    Runs of one size err together, so that a quantile of all hides an unlucky size. Reaching up, both are therefore as
    wide as the unluckiest size needs; otherwise the alarm's quantile is also taken with each size left out, and the most
    lenient counts.
    """
    finals, lowests = [final_R for final_R, _ in misses], [lowest_R for _, lowest_R in misses]
    pooled = finals if folds == "smaller" else [np.concatenate(finals)]
    multiplier = max(_quantile(final_R, confidence) for final_R in pooled)
    subsets = [lowests]
    if folds == "smaller":
        subsets += [[lowest_R] for lowest_R in lowests]
    elif len(lowests) > 2:
        subsets += [lowests[:i] + lowests[i + 1 :] for i in range(len(lowests))]
    thresholds = []
    for subset in subsets:
        lowest_R = np.sort(np.concatenate(subset))
        rank = math.floor(rate * (lowest_R.size + 1))
        thresholds += [float(lowest_R[rank - 1])] if rank else []
    runs = sum(map(len, finals))
    return Calibration(folds, runs, multiplier, confidence, min(thresholds, default=-math.inf), rate)


def _quantile(value_R: np.ndarray, confidence: float) -> float:
    """Conformal quantile: the rank ceil((n + 1)·confidence) of n values, the largest where that is past the end."""
    return float(np.sort(value_R)[min(math.ceil(confidence * (value_R.size + 1)), value_R.size) - 1])


def _cross_predictions(past: Gains, folds: Folds, scale: Scale) -> list[tuple[np.ndarray, np.ndarray]]:
    """How far each size's runs miss when predicted from the fold's other sizes; folds that are too small are left out.

    Per size and run: the absolute deviation of the final gain, and the lowest deviation of any look.
    """
    found = []
    for size in np.unique(past.size_R):
        others = {"others": past.size_R != size, "smaller": past.size_R < size, "larger": past.size_R > size}[folds]
        known, new = past.take(others), past.take(past.size_R == size)
        design_RC = _design(known.gain_RS[:, 0], known.size_R, known.experts_R, scale)
        if len(design_RC) < 2 * COLUMNS or np.linalg.matrix_rank(design_RC) < COLUMNS:
            continue
        mean_RS, deviation_RS = _predict(_fit(known, scale), new.gain_RS[:, 0], new.size_R, new.experts_R, scale)
        final_R = (_scaled(new.gain_RS[:, -1], scale) - mean_RS[:, -1]) / deviation_RS[:, -1]
        found.append((np.abs(final_R), _standardised(new.gain_RS[:, 1:], mean_RS, deviation_RS, scale).min(1)))
    return found


def _scale(past: Gains) -> Scale:
    return "linear" if np.mean(past.gain_RS.min(1) <= GAIN_FLOOR) > BEHIND else "log"


def _fit(past: Gains, scale: Scale) -> MixedFit:
    gain_R = past.gain_RS[:, 0]
    target_RS = _scaled(past.gain_RS[:, 1:], scale) - _scaled(gain_R, scale)[:, None]
    return fit_mixed(_design(gain_R, past.size_R, past.experts_R, scale), target_RS, _noise(gain_R, scale), past.size_R)


def _predict(
    fit: MixedFit, gain_R: np.ndarray, size_R: np.ndarray, experts_R: np.ndarray, scale: Scale
) -> tuple[np.ndarray, np.ndarray]:
    mean_RS, deviation_RS = fit.predict(_design(gain_R, size_R, experts_R, scale), _noise(gain_R, scale))
    return mean_RS + _scaled(gain_R, scale)[:, None], deviation_RS


def _standardised(gain_RS: np.ndarray, mean_RS: np.ndarray, deviation_RS: np.ndarray, scale: Scale) -> np.ndarray:
    """Deviations of (log) gain from their mean, in units of the path's deviation and of one evaluation's noise together."""
    look_RS = LOOK_NOISE * (np.exp(-mean_RS) if scale == "log" else np.ones_like(mean_RS))
    return (_scaled(gain_RS, scale) - mean_RS) / np.hypot(deviation_RS, look_RS)


def _scaled(gain: np.ndarray, scale: Scale) -> np.ndarray:
    return np.log(np.maximum(gain, GAIN_FLOOR)) if scale == "log" else gain


def _design(gain_R: np.ndarray, size_R: np.ndarray, experts_R: np.ndarray, scale: Scale) -> np.ndarray:
    columns = (np.ones_like(gain_R), np.log(size_R / SIZE_UNIT), _scaled(gain_R, scale), np.log(experts_R))
    return np.stack(columns, 1)


def _noise(gain_R: np.ndarray, scale: Scale) -> np.ndarray:
    """Error variance of each run in units of σ²: a small gain is known less well, relatively."""
    if scale == "linear":
        return np.ones_like(gain_R)
    return 1 + (LOOK_NOISE / RELATIVE_ERROR / np.maximum(gain_R, GAIN_FLOOR)) ** 2
