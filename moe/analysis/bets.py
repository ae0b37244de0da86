"""The promised gain of one run against fresh validation rows: what both runs logged of them, and the bet on it (`betting.py`).

A run with `evaluation.fresh_rows` writes each row's loss at each evaluation to fresh.jsonl, and no row is looked at twice.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from moe.analysis.betting import monitor
from moe.analysis.rows import read_lines
from moe.errors import UserError

FILE = "fresh.jsonl"
FRESH = {"step": (int,), "first": (int,), "nats": (list,)}
Json = dict[str, Any]


def read_fresh(folder: Path) -> dict[int, dict[int, float]]:
    """Nats per token of each fresh row, by step and row; a loss that was not finite is infinite. Raises UserError."""
    if not (folder / FILE).exists():
        raise UserError(f"{folder} has no {FILE}: set evaluation.fresh_rows in both runs, e.g. to 32.")
    rows = read_lines(folder / FILE, FRESH, lambda row: (row["step"],))
    return {
        row["step"]: {row["first"] + i: math.inf if nats is None else float(nats) for i, nats in enumerate(row["nats"])}
        for row in rows
    }


def bet(
    sparse: Path, dense: Path, span: tuple[float, float], *, promise: float, bound: float, false_alarm_rate: float
) -> Json:
    """The evidence against a gain of at least `promise` nats per token at every evaluation, from the steps of `span`.

    A row on which the sparse run is not finite counts as losing by the bound, one on which the dense is as gaining by it.
    Raises UserError where a file is missing, the runs share no fresh row, or a row gains more than the bound above the promise.
    """
    ours, theirs = read_fresh(sparse), read_fresh(dense)
    steps = sorted(step for step in ours.keys() & theirs.keys() if span[0] <= step <= span[1])
    keys = [(step, row) for step in steps for row in sorted(ours[step].keys() & theirs[step].keys())]
    if not keys:
        raise UserError(
            f"{sparse} and {dense} share no fresh rows from step {span[0]:g} on: they need the same evaluation.every_steps "
            "and fresh_rows."
        )
    difference_N = np.array([_gain(theirs[step][row], ours[step][row], promise, bound) for step, row in keys])
    found = monitor(promise, difference_N, bound=bound, false_alarm_rate=false_alarm_rate)
    return {
        "promise": promise,
        "bound": bound,
        "fresh_rows": len(keys),
        "mean_gain": float(np.mean(difference_N)),
        "wealth": float(found.wealth_N[-1]),
        "clipped": found.clipped,
        "promise_false_alarm_rate": false_alarm_rate,
        "promise_alarm": keys[found.alarm - 1][0] if found.alarm is not None else None,
    }


def _gain(dense: float, sparse: float, promise: float, bound: float) -> float:
    if math.isfinite(dense) and math.isfinite(sparse):
        return dense - sparse
    return promise + bound * (math.isfinite(sparse) - math.isfinite(dense))


def describe(result: Json) -> str:
    """The bet in words."""
    alarm = "no alarm" if result["promise_alarm"] is None else f"ALARM at step {result['promise_alarm']}"
    return (
        f"promise of {result['promise']:g} nats: mean gain {result['mean_gain']:+.4f} over {result['fresh_rows']} fresh rows, "
        f"evidence against it {result['wealth']:.3g} (alarm at {1 / result['promise_false_alarm_rate']:.0f}); {alarm}"
    )
