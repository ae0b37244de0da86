"""Forecasts that were made while a run trained, against what came of it: the rows of forecast.jsonl, read tolerantly."""

import json
import math
from collections.abc import Sequence

from moe.analysis.report.curves import brief
from moe.analysis.rows import NUMBER, Json, RunRows


def forecast_rows(run: RunRows) -> list[Json]:
    """The looks of a run's forecast, by share of training, the last attempt of each; lines without the figures are passed over."""
    path = run.path / "forecast.jsonl"
    rows: dict[float, Json] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill cut off
            continue
        if isinstance(row, dict) and all(_number(row.get(name)) for name in ("share", "low", "high")):
            rows[float(row["share"])] = row
    return [rows[share] for share in sorted(rows)]


def _number(value: object) -> bool:
    return isinstance(value, NUMBER) and not isinstance(value, bool) and math.isfinite(value)


def forecast_chart(run: RunRows, twin: RunRows | None) -> Json | None:
    """A run's forecasts of its final gain and the gains that came, in nats per token; None where none was made.

    The gains are those over `twin` where both were evaluated; without a twin, those that the forecast's own rows logged.
    """
    rows = forecast_rows(run)
    if not rows:
        return None
    came = _gains(run, twin) if twin is not None else []
    came = came or [(row["share"], row["gain"]) for row in rows if _number(row.get("gain"))]
    finished = run.summary["status"] == "finished" and (twin is None or twin.summary["status"] == "finished")
    alarms = [row["share"] for row in rows if row.get("alarm") not in (None, False)]
    return {
        "run": run.path.name,
        "seed": run.config["seed"],
        "looks": {
            "share": brief([row["share"] for row in rows]),
            "low": brief([row["low"] for row in rows]),
            "high": brief([row["high"] for row in rows]),
            "forecast": brief([row["forecast"] if _number(row.get("forecast")) else math.nan for row in rows]),
        },
        "came": {"share": brief([share for share, _ in came]), "gain": brief([gain for _, gain in came])},
        "final": brief([came[-1][1]])[0] if came and finished else None,
        "alarm": brief(alarms[:1])[0] if alarms else None,
        "sentence": _sentence(run, rows, came[-1][1] if came and finished else None, alarms),
    }


def _gains(run: RunRows, twin: RunRows) -> list[tuple[float, float]]:
    """(share of training, twin's minus the run's loss) where both were evaluated on as many rows."""
    steps = run.config["train"]["steps"]
    losses = [
        {(r["step"], r["final"]): r["loss"] for r in one.evals if r.get("loss") is not None} for one in (run, twin)
    ]
    common = sorted(key for key in losses[0].keys() & losses[1].keys() if key[0] > 0)
    last = {step: (step, final) for step, final in common}  # the final evaluation has more rows than the one before it
    return [(step / steps, losses[1][key] - losses[0][key]) for step, key in last.items()]


def _sentence(run: RunRows, rows: Sequence[Json], final: float | None, alarms: Sequence[float]) -> str:
    first, last = rows[0], rows[-1]
    text = (
        f"{run.path.name}: at {first['share']:.0%} of training the final gain was forecast in "
        f"[{first['low']:+.4f}, {first['high']:+.4f}] nats per token"
    )
    if len(rows) > 1:
        text += f", at {last['share']:.0%} in [{last['low']:+.4f}, {last['high']:+.4f}]"
    if final is not None:
        inside = "inside" if first["low"] <= final <= first["high"] else "outside"
        text += f"; {final:+.4f} came, {inside} the first interval"
    text += f". Alarm at {alarms[0]:.0%}." if alarms else ". No alarm."
    return text.replace("-", "−") if "[-" in text else text
