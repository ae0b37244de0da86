"""The forecast of one sparse run that may still be training, from its evaluations and those of its dense twin.

Learnt from a file of finished runs. Gains are read at that file's own shares of training, between evaluations by
interpolation, so that the alarm looks exactly as often as its threshold was calibrated for, whatever the interval here.
Past runs of another schedule are translated to the new run's (`translate.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe import cost
from moe.analysis.curves import Curve, gains
from moe.analysis.forecast import BEYOND, Forecaster, fit_forecaster
from moe.analysis.rows import EVALS, read_json, read_lines
from moe.analysis.translate import same_shape, to_schedule
from moe.config.load import load
from moe.config.schema import Run, Schedule
from moe.errors import UserError

Json = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What a forecast must know of a sparse run."""

    size: float
    """Active parameters."""
    experts: int
    steps: int
    schedule: Schedule


@dataclass(frozen=True)
class Learnt:
    """A forecaster for one run, and what it was learnt from."""

    forecaster: Forecaster
    past_runs: int
    beyond_past_sizes: bool
    form: str
    """`plain`: past runs at the same share of training. `rate-aware`: past runs of another schedule, translated."""


def subject_of(run: Run) -> Subject:
    """The part of a sparse run's config that is forecast with."""
    assert run.model.moe is not None
    size = float(cost.parameters(run.model).active)
    return Subject(size, run.model.moe.num_experts, run.train.steps, run.train.schedule)


def learn(
    curves: Sequence[Curve], subject: Subject, *, anchor: float, confidence: float, false_alarm_rate: float
) -> Learnt:
    """Fit and calibrate on past runs, brought to the run's schedule where the file tells theirs and it is another one.

    Raises DataError for too few of them, evaluations too far from the anchor, or schedules of some runs only.
    """
    form = "plain"
    if any(curve.schedule is not None for curve in curves):
        moved = to_schedule(curves, subject.schedule, subject.steps)
        form = "rate-aware" if any(new is not old for new, old in zip(moved, curves, strict=True)) else "plain"
        curves = moved
    past = gains(curves, anchor)
    forecaster = fit_forecaster(past, subject.size, confidence=confidence, false_alarm_rate=false_alarm_rate)
    beyond = not past.size_R.min() / BEYOND <= subject.size <= past.size_R.max() * BEYOND
    return Learnt(forecaster, int(past.size_R.size), bool(beyond), form)


def look(learnt: Learnt, subject: Subject, progress_S: np.ndarray, gain_S: np.ndarray) -> Json:
    """The forecast and its alarm from the gains so far; the first of them must not lie after the anchor, nor the last before it."""
    forecaster, anchor = learnt.forecaster, learnt.forecaster.anchor
    calibration = forecaster.calibration
    point = np.interp([anchor], progress_S, gain_S), np.array([subject.size]), np.array([float(subject.experts)])
    low, middle, high = forecaster.final(*point)[0].tolist()
    grid_S = forecaster.progress_S
    later_S = np.interp(grid_S, progress_S, gain_S)
    seen_S = grid_S <= progress_S[-1] + 1e-9
    z_S = forecaster.deviations(*point, later_S[None])[0]
    fired = np.flatnonzero(seen_S & (z_S < calibration.threshold))
    return {
        "progress": float(progress_S[-1]),
        "anchor": anchor,
        "gain_at_anchor": float(point[0][0]),
        "gain_now": float(gain_S[-1]),
        "forecast": middle,
        "low": low,
        "high": high,
        "confidence": calibration.confidence,
        "form": learnt.form,
        "scale": forecaster.scale,
        "past_runs": learnt.past_runs,
        "beyond_past_sizes": learnt.beyond_past_sizes,
        "false_alarm_rate": calibration.false_alarm_rate,
        "threshold": calibration.threshold if math.isfinite(calibration.threshold) else None,
        "looks": [
            {"progress": float(p), "gain": float(g), "deviation": float(z)}
            for p, g, z in zip(grid_S[seen_S], later_S[seen_S], z_S[seen_S], strict=True)
        ],
        "alarm": float(grid_S[fired[0]]) if fired.size else None,
    }


def require_reach(learnt: Learnt, progress_S: np.ndarray) -> None:
    """Raise UserError where the evaluations do not enclose the anchor."""
    anchor = learnt.forecaster.anchor
    if not progress_S[0] <= anchor + 1e-9 or not anchor <= progress_S[-1] + 1e-9:
        raise UserError(
            f"both runs were evaluated from {progress_S[0]:.1%} to {progress_S[-1]:.1%} of training, the anchor is at "
            f"{anchor:.1%}: train on, evaluate earlier, or choose another anchor."
        )


def require_twin(run: Run, sparse: Path, dense: Path) -> None:
    """Raise UserError where the folder holds no dense run of as many steps with the same schedule."""
    twin = load(read_json(dense / "run.json", {"run": (dict,)})["run"])
    if twin.model.moe is not None:
        raise UserError(f"{sparse} must be a sparse run and {dense} a dense one: exchange or correct the folders.")
    steps, other = run.train.steps, twin.train.steps
    if steps != other or not same_shape(run.train.schedule, steps, twin.train.schedule, other):
        raise UserError(
            f"{sparse} trains {steps} steps ({run.train.schedule.name}) and {dense} {other} ({twin.train.schedule.name}): a gain "
            "needs the same schedule."
        )


def gains_so_far(sparse: Path, dense: Path, steps: int, until: float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    """(share of training, dense minus sparse loss) at the steps up to `until` where both were evaluated on as many rows.

    The final evaluation is used only where there is no other of its step, because it has other rows.
    """
    tables = []
    for folder in (sparse, dense):
        rows = read_lines(folder / "evals.jsonl", EVALS, lambda row: (row["step"], row["final"]))
        tables.append({(row["step"], row["final"]): row for row in rows if row.get("loss") is not None})
    common = sorted((key for key in tables[0].keys() & tables[1].keys() if 0 < key[0] <= until), reverse=True)
    first = dict(common)  # of a step's two evaluations the one that is not final, which comes last here
    if len(first) < 2:
        raise UserError(f"{sparse} and {dense} share {len(first)} evaluations, 2 are needed: train on.")
    step_S = sorted(first)
    gain_S = np.array([tables[1][s, first[s]]["loss"] - tables[0][s, first[s]]["loss"] for s in step_S])
    return np.array(step_S) / steps, gain_S
