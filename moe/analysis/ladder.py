"""The gain at a size that has not been trained, from a ladder of smaller ones, less the optimism such forecasts have.

Two forms, per router: the gain as a line in log size for each number of experts, and the routed law against the dense
power law (`scaling.py`). Both over-state, because the gain shrinks faster than either. By how much is measured on the
ladder itself: each of its upper rungs is predicted from those below, and

    optimism = share · ln(target / largest rung) · predicted gain

is fitted to the over-statements through the origin and subtracted. What is left of them, per unit of ln(size ratio),
gives the interval (split conformal).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from moe.analysis.curves import DENSE, Curve, Gains, size_of
from moe.analysis.scaling import final_losses, fit_power_law, fit_routed_law, linear_gain
from moe.errors import DataError

Form = Literal["linear", "law"]
FORMS: tuple[Form, ...] = ("linear", "law")
MIN_SIZES = 3
MIN_MISSES = 9
"""Predicted rungs below which no rank of their misses is a 90 % quantile."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Ladder:
    """Final losses of finished runs, sparse ones beside the dense one of their size; [R] each."""

    size_R: np.ndarray
    experts_R: np.ndarray
    router_R: np.ndarray
    dense_R: np.ndarray
    """Loss of the dense run of the same size, nats."""
    gain_R: np.ndarray

    def take(self, keep_R: np.ndarray) -> "Ladder":
        """The runs that a mask selects."""
        return Ladder(
            *(getattr(self, name)[keep_R] for name in ("size_R", "experts_R", "router_R", "dense_R", "gain_R"))
        )


@dataclass(frozen=True)
class Optimism:
    """What back-tests within a ladder have shown of one form."""

    share: float
    """Over-statement as a share of the predicted gain, per factor e from the largest rung to the target."""
    spread: float
    """Nats per factor e that bound the given share of what remains."""
    misses: int
    confidence: float

    def correct(self, predicted_R: np.ndarray, reach: float) -> np.ndarray:
        """(low, middle, high) [R, 3] of predictions at a size e^reach times the largest rung's."""
        middle_R = predicted_R * (1 - self.share * reach)
        return middle_R[:, None] + reach * self.spread * np.array([-1.0, 0.0, 1.0])


def predict(ladder: Ladder, target: float, router_R: np.ndarray, experts_R: np.ndarray, form: Form) -> np.ndarray:
    """Uncorrected gain at the target size for each (router, experts); NaN where the ladder cannot say."""
    if form == "linear":
        masks = [(ladder.router_R == r) & (ladder.experts_R == e) for r, e in zip(router_R, experts_R, strict=True)]
        return np.array([linear_gain(ladder.size_R[keep_R], ladder.gain_R[keep_R], target) for keep_R in masks])
    dense = {float(n): float(loss) for n, loss in zip(ladder.size_R, ladder.dense_R, strict=True)}
    dense_loss = fit_power_law(np.array(list(dense)), np.array(list(dense.values()))).loss(target)
    found_R = np.full(len(router_R), np.nan)
    for router in np.unique(router_R):
        rows = ladder.take(ladder.router_R == router)
        if rows.size_R.size < 7 or np.unique(rows.size_R).size < 2 or np.unique(rows.experts_R).size < 3:
            continue
        law = fit_routed_law(rows.size_R, rows.experts_R.astype(float), rows.dense_R - rows.gain_R)
        wanted = router_R == router
        found_R[wanted] = dense_loss - law.loss(target, experts_R[wanted])
    return found_R


def naive(ladder: Ladder, router_R: np.ndarray, experts_R: np.ndarray) -> np.ndarray:
    """The gain of the largest rung with the same router and experts: what "it worked in early tests" amounts to."""
    found = []
    for router, experts in zip(router_R, experts_R, strict=True):
        rows = ladder.take((ladder.router_R == router) & (ladder.experts_R == experts))
        found.append(rows.gain_R[np.argmax(rows.size_R)] if rows.size_R.size else math.nan)
    return np.array(found)


def measure_optimism(ladder: Ladder, form: Form, confidence: float = 0.9) -> Optimism:
    """Predict each rung from the third on from all below it, and see by how much that over-states.

    Raises DataError for fewer than three sizes, or too few predicted runs.
    """
    sizes = np.unique(ladder.size_R)
    if sizes.size < MIN_SIZES:
        raise DataError(
            f"optimism is measured by predicting a rung from two smaller ones: {MIN_SIZES} sizes are needed, found "
            f"{sizes.size}."
        )
    predicted, misses, reaches = [], [], []
    for top, rung in pairwise(sizes[1:]):
        new = ladder.take(ladder.size_R == rung)
        guess_R = predict(ladder.take(ladder.size_R <= top), float(rung), new.router_R, new.experts_R, form)
        known = np.isfinite(guess_R)
        predicted.append(guess_R[known])
        misses.append(guess_R[known] - new.gain_R[known])
        reaches.append(np.full(known.sum(), math.log(rung / top)))
    guess_M, miss_M, reach_M = map(np.concatenate, (predicted, misses, reaches))
    if miss_M.size < MIN_MISSES:
        raise DataError(
            f"the {form} form could be checked on {miss_M.size} runs of the ladder, {MIN_MISSES} are needed: train the same "
            "numbers of experts at every size."
        )
    scaled_M = guess_M * reach_M
    share = float(scaled_M @ miss_M / (scaled_M @ scaled_M))
    left_M = np.sort(np.abs(miss_M - share * scaled_M) / reach_M)
    rank = min(math.ceil(confidence * (left_M.size + 1)), left_M.size)
    return Optimism(share, float(left_M[rank - 1]), left_M.size, confidence)


def ladder_of(found: Gains) -> Ladder:
    """The final gains as a ladder."""
    return Ladder(found.size_R, found.experts_R, found.router_R, found.dense_R, found.gain_RS[:, -1])


def backtest(found: Gains, target: str, *, confidence: float = 0.9) -> Json:
    """Predict the size labelled `target` from all smaller ones and compare; docs/forecast.md has the keys.

    Raises DataError for an unknown size, or fewer than three smaller ones.
    """
    ladder, size = ladder_of(found), size_of(target, found)
    below, new = ladder.take(ladder.size_R < size), ladder.take(ladder.size_R == size)
    rungs = np.unique(below.size_R)
    if rungs.size < MIN_SIZES:
        raise DataError(f"{target} has {rungs.size} smaller sizes in the file, a ladder needs {MIN_SIZES}.")
    reach = math.log(size / rungs[-1])
    runs: list[Json] = [
        {"router": str(router), "experts": int(experts), "gain": float(gain)}
        for router, experts, gain in zip(new.router_R, new.experts_R, new.gain_R, strict=True)
    ]
    forms: Json = {"naive": {"before": _errors(naive(below, new.router_R, new.experts_R) - new.gain_R)}}
    for form in FORMS:
        optimism = measure_optimism(below, form, confidence)
        guess_R = predict(below, size, new.router_R, new.experts_R, form)
        interval_R3 = optimism.correct(guess_R, reach)
        inside_R = (interval_R3[:, 0] <= new.gain_R) & (new.gain_R <= interval_R3[:, 2])
        known = np.isfinite(guess_R)
        forms[form] = {
            "before": _errors(guess_R - new.gain_R),
            "after": _errors(interval_R3[:, 1] - new.gain_R),
            "coverage": float(inside_R[known].mean()),
            "width": 2 * reach * optimism.spread,
            "optimism_share": optimism.share,
            "calibration_runs": optimism.misses,
        }
        for run, guess, interval in zip(runs, guess_R, interval_R3, strict=True):
            low, middle, high = (float(value) for value in interval)
            found_here = math.isfinite(middle)
            run[form] = {"before": float(guess), "low": low, "gain": middle, "high": high} if found_here else None
    return {
        "schema_version": 1,
        "unit": "nats per token",
        "target": target,
        "active_parameters": size,
        "ladder": [str(found.label_R[found.size_R == rung][0]) for rung in rungs],
        "ladder_runs": int(below.size_R.size),
        "reach": reach,
        "confidence": confidence,
        "left_out": list(found.left_out),
        "forms": forms,
        "per_run": runs,
    }


def _errors(error_R: np.ndarray) -> Json:
    """Mean over-statement and root mean square error, nats, over the runs that were predicted."""
    error_R = error_R[np.isfinite(error_R)]
    if not error_R.size:
        raise DataError("no run of the target size has its router and number of experts on the ladder.")
    return {"mean": float(error_R.mean()), "rms": float(np.sqrt(np.mean(error_R**2))), "runs": int(error_R.size)}


def fit_laws(curves: Sequence[Curve]) -> Json:
    """The routed law of each router that has enough runs, and the dense power law, from each run's last finite loss."""
    laws: Json = {}
    for router in sorted({curve.router for curve in curves if not curve.is_dense}):
        law = fit_routed_law(*final_losses(curves, router))
        laws[router] = {**asdict(law), "cutoff": law.cutoff}
    size_R, _, loss_R = final_losses(curves, DENSE)
    return {
        "schema_version": 1,
        "unit": "nats per token",
        "routers": laws,
        "dense": asdict(fit_power_law(size_R, loss_R)),
    }


def describe_laws(result: Json) -> str:
    """The fitted laws as a table."""
    names = ("a", "b", "c", "d", "e_start", "e_max", "rmse", "runs")
    lines = [f"{'router':<10}" + "".join(f"{name:>10}" for name in names)]
    lines += [
        f"{router:<10}" + "".join(f"{law[name]:>10.4g}" for name in names) for router, law in result["routers"].items()
    ]
    dense = result["dense"]
    return "\n".join(
        [*lines, f"dense: loss = 10^{dense['d']:.4f} · N^-{dense['alpha']:.4f}, rmse {dense['rmse']:.4f} nats"]
    )


def describe(result: Json) -> str:
    """A back-test in words."""
    lines = [
        f"gain at {result['target']} predicted from {', '.join(result['ladder'])} ({result['ladder_runs']} runs), nats per "
        "token:"
    ]
    for form, found in result["forms"].items():
        before, after = found["before"], found.get("after")
        line = f"{form:<7} over-states by {before['mean']:+.4f} (rms {before['rms']:.4f})"
        if after:
            line += (
                f"; less its optimism {after['mean']:+.4f} (rms {after['rms']:.4f}); {result['confidence']:.0%} intervals, "
                f"{found['width']:.4f} wide, cover {found['coverage']:.0%}"
            )
        lines.append(f"{line}  [{before['runs']} runs]")
    return "\n".join(lines)
