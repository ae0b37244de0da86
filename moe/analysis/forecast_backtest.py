"""How good would the forecast have been? One size is held out, the others are fitted, and the truth is compared.

Faults are synthetic: from a third of the training the gain slides, over a tenth of it, to that of the same model with
fewer experts (0 where that leaves one). docs/forecast.md has the keys of the result.
"""

import math
from typing import Any, Literal

import numpy as np

from moe.analysis.curves import Gains, size_of
from moe.analysis.forecast import Forecaster, fit_forecaster
from moe.errors import DataError

FAULT_START, FAULT_SLIDE = 0.32, 0.10
FAULT_FACTORS = (2, 4, 8)
FitOn = Literal["others", "smaller"]
Json = dict[str, Any]


def backtest(
    found: Gains, hold_out: str, *, fit_on: FitOn = "others", confidence: float = 0.9, false_alarm_rate: float = 0.05
) -> Json:
    """Hold out one size (by label), or every size in turn with `all`; the result's `pooled` counts runs alike.

    Raises DataError for an unknown size or `fit_on`, or too few runs to learn from.
    """
    if fit_on not in ("others", "smaller"):
        raise DataError(f"--fit-on ({fit_on!r}) must be others or smaller: the sizes to learn from.")
    sizes = np.unique(found.size_R) if hold_out == "all" else np.array([size_of(hold_out, found)])
    results = []
    for size in sizes:
        held = found.size_R == size
        past = found.take(~held if fit_on == "others" else found.size_R < size)
        forecaster = fit_forecaster(past, size, confidence=confidence, false_alarm_rate=false_alarm_rate)
        results.append(_one_size(forecaster, past, found.take(held)))
    settings = {"anchor": float(found.progress_S[0]), "confidence": confidence, "false_alarm_rate": false_alarm_rate}
    return {
        "schema_version": 1,
        "unit": "nats per token",
        **settings,
        "fit_on": fit_on,
        "looks": found.progress_S.size - 1,
        "left_out": list(found.left_out),
        "sizes": results,
        "pooled": _summary([run for result in results for run in result["per_run"]]),
    }


def _one_size(forecaster: Forecaster, past: Gains, new: Gains) -> Json:
    gain_R, truth_R = new.gain_RS[:, 0], new.gain_RS[:, -1]
    interval_R3 = forecaster.final(gain_R, new.size_R, new.experts_R)
    calibration = forecaster.calibration
    healthy_RS = forecaster.deviations(gain_R, new.size_R, new.experts_R, new.gain_RS[:, 1:])
    runs: list[Json] = []
    for i in range(gain_R.size):
        low, middle, high = (float(value) for value in interval_R3[i])
        runs.append(
            {
                "run": str(new.run_R[i]),
                "router": str(new.router_R[i]),
                "experts": int(new.experts_R[i]),
                "gain_at_anchor": float(gain_R[i]),
                "forecast": middle,
                "low": low,
                "high": high,
                "final_gain": float(truth_R[i]),
                "error": abs(middle - float(truth_R[i])) / max(abs(float(truth_R[i])), 1e-12),
                "covered": low <= float(truth_R[i]) <= high,
                "false_alarm": bool(healthy_RS[i].min() < calibration.threshold),
                "faults": {str(factor): _fault(forecaster, new, i, factor) for factor in FAULT_FACTORS},
            }
        )
    return {
        "held_out": str(new.label_R[0]),
        "active_parameters": float(new.size_R[0]),
        "fitted_runs": int(past.size_R.size),
        "fitted_sizes": [str(past.label_R[past.size_R == size][0]) for size in np.unique(past.size_R)],
        "calibration_folds": calibration.folds,
        "calibration_runs": calibration.runs,
        "multiplier": calibration.multiplier,
        "threshold": calibration.threshold if math.isfinite(calibration.threshold) else None,
        **_summary(runs),
        "per_run": runs,
    }


def _fault(forecaster: Forecaster, new: Gains, i: int, factor: int) -> Json | None:
    """Whether a collapse to E/factor experts is noticed, and how much training later; None without such a run."""
    experts = new.experts_R[i] / factor
    if new.experts_R[i] <= factor:
        return None
    same = np.flatnonzero(
        (new.size_R == new.size_R[i]) & (new.router_R == new.router_R[i]) & (new.experts_R == experts)
    )
    if not same.size:
        return None
    slide_S = np.clip((new.progress_S - FAULT_START) / FAULT_SLIDE, 0, 1)
    faulty_S = (1 - slide_S) * new.gain_RS[i] + slide_S * new.gain_RS[same[0]]
    one = slice(i, i + 1)
    z_S = forecaster.deviations(
        new.gain_RS[one, 0], new.size_R[one], new.experts_R[one], faulty_S[None, 1:]
    )[0]  # fmt: skip
    late = forecaster.progress_S > FAULT_START
    alarms = forecaster.progress_S[late & (z_S < forecaster.calibration.threshold)]
    return {"detected": bool(alarms.size), "delay": float(alarms[0] - FAULT_START) if alarms.size else None}


def _summary(runs: list[Json]) -> Json:
    """Shares and medians over runs."""
    faults: Json = {}
    for factor in FAULT_FACTORS:
        tried = [run["faults"][str(factor)] for run in runs if run["faults"][str(factor)] is not None]
        delays = [fault["delay"] for fault in tried if fault["detected"]]
        faults[str(factor)] = {
            "runs": len(tried),
            "detected": sum(fault["detected"] for fault in tried) / len(tried) if tried else None,
            "median_delay": float(np.median(delays)) if delays else None,
        }
    return {
        "runs": len(runs),
        "median_error": float(np.median([run["error"] for run in runs])),
        "coverage": float(np.mean([run["covered"] for run in runs])),
        "median_width": float(np.median([run["high"] - run["low"] for run in runs])),
        "median_relative_width": float(np.median([(run["high"] - run["low"]) / run["forecast"] for run in runs])),
        "false_alarms": float(np.mean([run["false_alarm"] for run in runs])),
        "faults": faults,
    }


def describe(result: Json) -> str:
    """A back-test as a table."""
    lines = [
        f"final gain forecast at {result['anchor']:.1%} of training, sizes held out and fitted on {result['fit_on']}; "
        f"{result['confidence']:.0%} intervals; alarms at {result['false_alarm_rate']:.0%} per run over {result['looks']} looks",
        f"{'size':<8}{'runs':>6}{'error':>8}{'covers':>8}{'width':>8}{'false alarms':>14}  detected E/2, E/4, E/8 (delay)",
    ]
    rows = [(size["held_out"], size) for size in result["sizes"]]
    for name, row in [*rows, ("pooled", result["pooled"])]:
        faults = ", ".join(
            "none to try"
            if fault["detected"] is None
            else f"{fault['detected']:.0%} ({fault['median_delay'] or 0:.1%})"
            for fault in row["faults"].values()
        )
        lines.append(
            f"{name:<8}{row['runs']:>6}{row['median_error']:>8.1%}{row['coverage']:>8.0%}{row['median_width']:>8.4f}"
            f"{row['false_alarms']:>14.1%}  {faults}"
        )
    return "\n".join([*lines, *(f"left out: {reason}" for reason in result["left_out"])])
