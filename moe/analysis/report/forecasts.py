"""Forecasts of final gains against what came: the rows of forecast.jsonl, read tolerantly, or made afterwards."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from moe.analysis.gain_watch import learn_for, watch
from moe.analysis.report.curves import brief
from moe.analysis.report.words import signed
from moe.analysis.rows import NUMBER, Json, RunRows
from moe.config.load import load
from moe.config.schema import Forecast


def forecast_rows(run: RunRows) -> list[Json]:
    """The looks of a run's forecast, by share of training, the last line of each; lines without one are passed over."""
    path = run.path / "forecast.jsonl"
    rows: dict[float, Json] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill cut off
            continue
        if isinstance(row, dict) and _number(row.get("share")) is not None:
            rows[float(row["share"])] = row
    return [rows[share] for share in sorted(rows)]


def _number(value: object) -> float | None:
    """The value if it is a finite number."""
    return float(value) if isinstance(value, NUMBER) and not isinstance(value, bool) and math.isfinite(value) else None


def forecast_from(past: Path, run: RunRows, twin: RunRows) -> list[Json]:
    """What the trainer would have logged with that file of past runs: the anchor and every look after it.

    Raises UserError for a file that does not suffice, and runs that are no pair or not far enough.
    """
    config = load(run.config)
    given = Forecast(past=str(past))
    found = watch(config, given, learn_for(config, given), run.path, twin.path)
    shared = {name: found[name] for name in ("low", "high", "forecast", "false_alarm_rate")}
    looks = [(found["anchor"], found["gain_at_anchor"]), *((look["progress"], look["gain"]) for look in found["looks"])]
    alarm = math.inf if found["alarm"] is None else found["alarm"]
    return [{"share": s, "gain": g, "alarm": alarm if s >= alarm else None, **shared} for s, g in looks]


def forecast_chart(label: str, run: RunRows, twin: RunRows | None, past: Path | None = None) -> Json | None:
    """A run's forecasts of its final gain and the gains that came, in nats per token; None where none was made.

    The gains are those over `twin` where both were evaluated; without a twin, those that the forecast's own rows logged. Where
    none was logged, `past` is a file of past runs to make it from now.
    """
    rows = forecast_rows(run) or (forecast_from(past, run, twin) if past is not None and twin is not None else [])
    came = _gains(run, twin) if twin is not None else []
    came = came or [(row["share"], gain) for row in rows if (gain := _number(row.get("gain"))) is not None]
    if not rows or not came:
        return None
    whole = run.summary["status"] == "finished" and (twin is None or twin.summary["status"] == "finished")
    final, alarm = came[-1][1] if whole else None, _alarm(run, rows)
    looks = {name: [_number(row.get(name)) for row in rows] for name in ("share", "low", "high", "forecast")}
    return {
        "run": label,
        "looks": {name: brief([math.nan if v is None else v for v in values]) for name, values in looks.items()},
        "came": {"share": brief([share for share, _ in came]), "gain": brief([gain for _, gain in came])},
        "final": None if final is None else brief([final])[0],
        "alarm": alarm,
        "sentence": f"{label}: {_forecast_words(rows, final)}; {_alarm_words(rows, alarm)}.",
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


def _alarm(run: RunRows, rows: Sequence[Json]) -> float | None:
    """Share of training at which the first alarm was raised, against past runs or against a promise."""
    found = []
    for row in rows:
        at, step = _number(row.get("alarm")), _number(row.get("promise_alarm"))
        if row.get("alarm") is True:
            at = row["share"]
        found += [
            value for value in (at, None if step is None else step / run.config["train"]["steps"]) if value is not None
        ]
    return brief([min(found)])[0] if found else None


def _forecast_words(rows: Sequence[Json], final: float | None) -> str:
    known = [
        (row["share"], row["low"], row["high"])
        for row in rows
        if _number(row.get("low")) is not None and _number(row.get("high")) is not None
    ]
    if not known:
        return "no forecast from past runs was made"
    (share, low, high), (later, *ends) = known[0], known[-1]
    text = f"at {share:.0%} of training its final gain was forecast in [{signed(low, 4)}, {signed(high, 4)}] nats per token"
    if len(known) > 1:
        text += f", at {later:.0%} in [{signed(ends[0], 4)}, {signed(ends[1], 4)}]"
    if final is not None:
        text += f"; {signed(final, 4)} came, {'inside' if low <= final <= high else 'outside'} the first interval"
    return text


def _alarm_words(rows: Sequence[Json], alarm: float | None) -> str:
    rate = _number(rows[-1].get("false_alarm_rate"))
    odds = "" if rate is None else f" ({100 * rate:g} % of healthy runs are alarmed)"
    return f"no alarm{odds}" if alarm is None else f"ALARM at {alarm:.0%}{odds}"
