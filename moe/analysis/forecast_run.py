"""The forecast of one sparse run that may still be training, from its evaluations and those of its dense twin.

Learnt from a file of finished runs. Gains are read at that file's own shares of training, between evaluations by
interpolation, so that the alarm looks exactly as often as its threshold was calibrated for, whatever the interval here.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from moe import cost
from moe.analysis.curves import Gains
from moe.analysis.forecast import fit_forecaster
from moe.analysis.rows import EVALS, read_json, read_lines
from moe.config.load import load
from moe.errors import UserError

Json = dict[str, Any]


def forecast_run(
    sparse: Path, dense: Path, past: Gains, *, confidence: float = 0.9, false_alarm_rate: float = 0.05
) -> Json:
    """Forecast of the final gain in nats per token, and the looks so far; both runs may be unfinished.

    Raises UserError where the folders are not a sparse run and its dense twin, or not far enough for the anchor.
    """
    run, twin = (load(read_json(folder / "run.json", {"run": (dict,)})["run"]) for folder in (sparse, dense))
    if run.model.moe is None or twin.model.moe is not None:
        raise UserError(f"{sparse} must be a sparse run and {dense} a dense one: exchange or correct the folders.")
    if run.train.steps != twin.train.steps:
        raise UserError(
            f"{sparse} trains {run.train.steps} steps and {dense} {twin.train.steps}: a gain needs the same schedule."
        )
    progress_S, gain_S = _gains(sparse, dense, run.train.steps)
    anchor = float(past.progress_S[0])
    if not progress_S[0] <= anchor <= progress_S[-1]:
        raise UserError(
            f"both runs were evaluated from {progress_S[0]:.1%} to {progress_S[-1]:.1%} of training, the anchor is at "
            f"{anchor:.1%}: train on, evaluate earlier, or choose another --anchor."
        )
    size, experts = float(cost.parameters(run.model).active), run.model.moe.num_experts
    forecaster = fit_forecaster(past, size, confidence=confidence, false_alarm_rate=false_alarm_rate)
    point = np.interp([anchor], progress_S, gain_S), np.array([size]), np.array([float(experts)])
    low, middle, high = forecaster.final(*point)[0].tolist()
    grid_S = forecaster.progress_S
    later_S = np.interp(grid_S, progress_S, gain_S)
    seen_S = grid_S <= progress_S[-1] + 1e-9
    z_S = forecaster.deviations(*point, later_S[None])[0]
    fired = np.flatnonzero(seen_S & (z_S < forecaster.calibration.threshold))
    return {
        "schema_version": 1,
        "unit": "nats per token",
        "active_parameters": size,
        "experts": experts,
        "progress": float(progress_S[-1]),
        "anchor": anchor,
        "gain_at_anchor": float(point[0][0]),
        "gain_now": float(gain_S[-1]),
        "forecast": middle,
        "low": low,
        "high": high,
        "confidence": confidence,
        "past_runs": int(past.size_R.size),
        "beyond_past_sizes": not past.size_R.min() <= size <= past.size_R.max(),
        "false_alarm_rate": false_alarm_rate,
        "threshold": forecaster.calibration.threshold if math.isfinite(forecaster.calibration.threshold) else None,
        "looks": [
            {"progress": float(p), "gain": float(g), "deviation": float(z)}
            for p, g, z in zip(grid_S[seen_S], later_S[seen_S], z_S[seen_S], strict=True)
        ],
        "alarm": float(grid_S[fired[0]]) if fired.size else None,
    }


def describe(result: Json) -> str:
    """The forecast in words."""
    lines = [
        f"at {result['progress']:.1%} of training the gain is {result['gain_now']:+.4f} nats per token (at "
        f"{result['anchor']:.1%}: {result['gain_at_anchor']:+.4f})",
        f"final gain {result['forecast']:.4f} [{result['low']:.4f}, {result['high']:.4f}], {result['confidence']:.0%} interval "
        f"from {result['past_runs']} past runs",
    ]
    if result["beyond_past_sizes"]:
        lines.append("this size lies beyond all past ones: the interval rests on how well they predicted one another")
    if result["threshold"] is None:
        lines.append(f"no alarm: too few past runs for a rate of {result['false_alarm_rate']:.1%} per run")
    elif result["alarm"] is None:
        lines.append(
            f"no alarm in {len(result['looks'])} looks ({result['false_alarm_rate']:.0%} false alarms per run)"
        )
    else:
        lines.append(
            f"ALARM at {result['alarm']:.1%}: the gain has fallen behind (false in {result['false_alarm_rate']:.0%} of "
            "healthy runs)"
        )
    return "\n".join(lines)


def _gains(sparse: Path, dense: Path, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(share of training, dense minus sparse loss) at the steps where both were evaluated on as many rows."""
    tables = []
    for folder in (sparse, dense):
        rows = read_lines(folder / "evals.jsonl", EVALS, lambda row: (row["step"], row["final"]))
        tables.append({(row["step"], row["final"]): row for row in rows if row.get("loss") is not None})
    common = sorted(key for key in tables[0].keys() & tables[1].keys() if key[0] > 0)
    last = {step: (step, final) for step, final in common}  # the final evaluation has more rows than the one before it
    if len(last) < 2:
        raise UserError(f"{sparse} and {dense} share {len(last)} evaluations, 2 are needed: train on.")
    gain_S = np.array([tables[1][key]["loss"] - tables[0][key]["loss"] for key in last.values()])
    return np.array(list(last)) / steps, gain_S
