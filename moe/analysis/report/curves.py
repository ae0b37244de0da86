"""Loss curves for the page: every run's evaluations and training loss against every budget, and bands over seeds."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.analysis.report.budgets import Budgets
from moe.analysis.report.reading import Arm
from moe.analysis.rows import Json, RunRows

MOST_POINTS = 240
"""Most points of a training loss; longer runs are averaged."""


def brief(values: Any) -> list[float | None]:
    """Numbers with six significant digits, None for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in np.asarray(values, dtype=float)]


def evaluations(run: RunRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, tokens and bits per byte [n] of the evaluations during training; NaN where a loss was not finite."""
    tokens = {row["step"]: row["tokens"] for row in run.metrics}
    rows = [row for row in run.evals if not row["final"] and row["step"] in tokens and tokens[row["step"]] > 0]
    bits = [math.nan if row["bits_per_byte"] is None else row["bits_per_byte"] for row in rows]
    return (
        np.array([r["step"] for r in rows], int),
        np.array([tokens[r["step"]] for r in rows], float),
        np.array(bits, float),
    )


def curves(arms: Sequence[Arm], budgets: Budgets) -> Json:
    """Every run's curves, with several seeds their mean and range; the `frame` of losses worth looking at, and
    whether it cuts any off.
    """
    drawn = []
    for arm in arms:
        per_token = budgets.of(arm.name)
        runs = [_run_curves(run, {n: rate[i] for n, rate in per_token.items()}) for i, run in enumerate(arm.runs)]
        drawn.append({"name": arm.name, "sparse": arm.sparse, "runs": runs, "mean": _mean(arm, per_token)})
    frame, bits = _frame(arms), [b for arm in drawn for run in arm["runs"] for b in run["bits"] if b is not None]
    return {"axes": budgets.axes, "arms": drawn, "frame": frame, "cut": bool(frame and bits and max(bits) > frame[1])}


def _run_curves(run: RunRows, per_token: dict[str, float]) -> Json:
    steps, tokens, bits = evaluations(run)
    train_tokens, loss = _training(run)
    final = run.final if run.evals else None
    at = next((row["tokens"] for row in reversed(run.metrics) if final and row["step"] <= final["step"]), 0)
    return {
        "name": run.path.name,
        "seed": run.config["seed"],
        "steps": steps.tolist(),
        "x": {name: brief(tokens * rate) for name, rate in per_token.items()},
        "bits": brief(bits),
        "final": None
        if final is None or not final["final"]
        else {
            "x": {name: brief([at * rate])[0] for name, rate in per_token.items()},
            "bits": brief([run.final_bits])[0],
        },
        "train": {"x": {name: brief(train_tokens * rate) for name, rate in per_token.items()}, "nats": brief(loss)},
    }


def _training(run: RunRows) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and training loss, averaged to MOST_POINTS points; steps without a finite loss are left out of the averages."""
    tokens = np.array([row["tokens"] for row in run.metrics], float)
    loss = np.array([math.nan if row["loss"] is None else row["loss"] for row in run.metrics], float)
    groups = np.array_split(np.arange(len(loss)), min(MOST_POINTS, max(len(loss), 1)))
    finite = [group[np.isfinite(loss[group])] for group in groups if group.size]
    ends = [tokens[group].mean() for group in groups if group.size]
    return np.array(ends, float), np.array([loss[g].mean() if g.size else math.nan for g in finite], float)


def _mean(arm: Arm, per_token: dict[str, list[float]]) -> Json | None:
    """Mean over seeds and their range at the steps that all have; None for one seed."""
    if len(arm.runs) < 2:
        return None
    tables = [
        dict(zip(steps.tolist(), zip(tokens, bits, strict=True), strict=True))
        for steps, tokens, bits in map(evaluations, arm.runs)
    ]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    tokens = np.array([[table[step][0] for step in common] for table in tables]).reshape(len(tables), -1)
    bits = np.array([[table[step][1] for step in common] for table in tables]).reshape(len(tables), -1)
    return {
        "steps": common,
        "x": {name: brief((tokens * np.array(rate)[:, None]).mean(0)) for name, rate in per_token.items()},
        "bits": brief(bits.mean(0)),
        "low": brief(bits.min(0)),
        "high": brief(bits.max(0)),
    }


def _frame(arms: Sequence[Arm]) -> list[float] | None:
    """The range of losses that follows the first quarter of training, with a margin; None without a finite one."""
    values = []
    for run in (run for arm in arms for run in arm.runs):
        _, tokens, bits = evaluations(run)
        values += [*bits[tokens >= run.summary["tokens"] / 4].tolist(), *([run.final_bits] if run.evals else [])]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    margin = 0.06 * (max(finite) - min(finite)) or 0.05
    return [min(finite) - margin, max(finite) + margin]
