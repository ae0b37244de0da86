"""What the forecast says of the runs of failures.py: alarms, delays, false alarms, other schedules.

Judged by the functions that the trainer and `moe forecast run` use, from the runs' files alone.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from failures_page import page_of

from moe.analysis.curves import Curve, gains, read_curves
from moe.analysis.forecast_run import gains_so_far, learn, look, subject_of
from moe.analysis.past_runs import collect
from moe.analysis.rows import all_lines
from moe.analysis.translate import to_schedule
from moe.config.load import load
from moe.config.schema import Run
from moe.files import write_json, write_text

ANCHOR, CONFIDENCE, RATE, MIDWAY = 0.3, 0.9, 0.05, 0.5
Json = dict[str, Any]


def finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return (folder / "summary.json").exists() and json.loads((folder / "summary.json").read_text())[
        "status"
    ] == "finished"


def judge(sparse: Path, dense: Path, curves: Sequence[Curve], kind: str, anchor: float = ANCHOR) -> Json:
    """The forecast of one run at its end, with every look, and what the doctor raised after the middle."""
    run: Run = load(sparse / "run.json")
    subject = subject_of(run)
    learnt = learn(curves, subject, anchor=anchor, confidence=CONFIDENCE, false_alarm_rate=RATE)
    result = look(learnt, subject, *gains_so_far(sparse, dense, subject.steps))
    rows = all_lines(sparse / "alarms.jsonl", {"step": (int,), "cause": (str,)})
    late = [(row["step"], row["cause"]) for row in rows if row["step"] >= MIDWAY * subject.steps]
    interval = float(np.median(np.diff(learnt.forecaster.progress_S)))
    return {
        "run": sparse.name,
        "kind": kind,
        "experts": subject.experts,
        "seed": run.seed,
        "alarmed": result["alarm"] is not None,
        "delay": None if result["alarm"] is None else result["alarm"] - MIDWAY,
        "interval": interval,
        "covered": result["low"] <= result["gain_now"] <= result["high"],
        "lowest_deviation": min(one["deviation"] for one in result["looks"]),
        "doctor": late,
        **result,
    }


def moved_errors(sparse: Path, dense: Path, cosine: tuple[Path, Path]) -> Json:
    """How far the gain of the same seed under a cosine is from the gain under WSD after the anchor, as it is and translated."""
    run: Run = load(sparse / "run.json")
    steps = run.train.steps
    share_S, truth_S = gains_so_far(sparse, dense, steps)
    curves = []
    for folder, router in zip(cosine, ("any", "Dense"), strict=True):
        rows = [row for row in all_lines(folder / "evals.jsonl", {"step": (int,)}) if not row["final"]]
        step_S, loss_S = (np.array([float(row[name]) for row in rows]) for name in ("step", "loss"))
        schedule = load(folder / "run.json").train.schedule
        curves.append(Curve(folder.name, router, 2, 1.0, "one", step_S, loss_S, 0, "", schedule))
    found = {}
    for name, pair in (("plain", curves), ("rate-aware", to_schedule(curves, run.train.schedule, steps))):
        gain_S = np.subtract(*(np.interp(share_S * steps, one.step_S, one.loss_S) for one in reversed(pair)))
        late = share_S > ANCHOR
        found[name] = float(np.sqrt(np.mean((gain_S - truth_S)[late] ** 2)))
        losses = [np.interp(share_S * steps, one.step_S, one.loss_S) for one in pair]
        true = [_losses(folder, share_S * steps) for folder in (sparse, dense)]
        found[f"{name} losses"] = float(
            np.sqrt(np.mean([np.square(a - b)[late].mean() for a, b in zip(losses, true, strict=True)]))
        )
    return found


def _losses(folder: Path, step_S: np.ndarray) -> np.ndarray:
    rows = [row for row in all_lines(folder / "evals.jsonl", {"step": (int,)}) if not row["final"]]
    return np.interp(step_S, [row["step"] for row in rows], [row["loss"] for row in rows])


def _counts(runs: Sequence[Json]) -> Json:
    """Alarms over healthy and over faulty runs, and healthy final gains inside their interval."""
    healthy = [run for run in runs if run["kind"] == "healthy"]
    faulty = [run for run in runs if run["kind"] not in ("healthy", "frozen")]
    return {
        "healthy": len(healthy),
        "false": sum(run["alarmed"] for run in healthy),
        "covered": sum(run["covered"] for run in healthy),
        "faulty": len(faulty),
        "alarmed": sum(run["alarmed"] for run in faulty),
    }


def write_report(out: Path, trials: Sequence[Any], docs: Path) -> Path:
    """Collect the past runs, judge the new ones that are there, and write the page; returns it."""
    collected = collect([out / "past"], out / "past.csv")
    curves = read_curves(out / "past.csv", top_k=2, routing_frequency=1.0)
    plain = [replace(curve, schedule=None) for curve in curves]
    judged, other, ours = [], [], []
    for one in trials:
        sparse, dense = one.planned.directory, one.dense
        if one.kind in ("past", "dense") or not finished(sparse) or not finished(dense):
            continue
        ours += [(one.kind, sparse, dense)] if one.kind != "wsd" else []
        judged.append(judge(sparse, dense, curves, one.kind))
        if one.kind == "wsd":
            unmoved = judge(sparse, dense, plain, one.kind)
            same = tuple(Path(str(f).replace("wsd", word)) for f, word in ((sparse, "healthy"), (dense, "cosine")))
            moved = moved_errors(sparse, dense, same) if all(map(finished, same)) else None  # type: ignore[arg-type]
            other.append({"run": sparse.name, "plain": unmoved, "moved": moved})
    past = gains(plain, ANCHOR)
    again = {
        f"{anchor:.0%}": _counts([judge(sparse, dense, curves, kind, anchor) for kind, sparse, dense in ours])
        for anchor in (0.2, 0.25, 0.35)
    }
    result = {
        "schema_version": 1,
        "collected": {**collected, "file": "past.csv"},
        "anchor": ANCHOR,
        "past_final_gains": {"least": float(past.gain_RS[:, -1].min()), "most": float(past.gain_RS[:, -1].max())},
        "missing": [one.planned.directory.name for one in trials if not finished(one.planned.directory)],
        "runs": judged,
        "other_schedule": other,
        "other_anchors": again,
    }
    write_json(docs / "failures.json", result)
    page = docs / "failures.md"
    write_text(page, page_of(result))
    return page
