"""Gains of one arm over another at an equal budget, paired by seed, over the whole of training.

The other arm's curve is read where it has used as much of the budget, linear in its logarithm between evaluations.
"""

import math
from collections.abc import Sequence

import numpy as np

from moe.analysis.paired import t_interval
from moe.analysis.report.budgets import Budgets
from moe.analysis.report.curves import brief, evaluations
from moe.analysis.report.reading import Arm
from moe.analysis.rows import Json, RunRows


def paired_gains(of: Arm, over: Arm, budgets: Budgets, confidence: float = 0.95) -> Json | None:
    """The gain of one arm over another at equal budget, seed by seed; null where they share no seed or no budget.

    `mean`, `low` and `high` over seeds at each evaluation of the first that lies within the other's, for every pair.
    """
    partner = {run.config["seed"]: i for i, run in enumerate(over.runs)}
    pairs = [(i, partner[run.config["seed"]]) for i, run in enumerate(of.runs) if run.config["seed"] in partner]
    found = {}
    mine, theirs = budgets.of(of.name), budgets.of(over.name)
    for name in (name for name in mine if name in theirs):
        one = _gain_at([(of.runs[i], mine[name][i], over.runs[j], theirs[name][j]) for i, j in pairs], confidence)
        if one is not None:
            found[name] = one
    return {"of": of.name, "over": over.name, "confidence": confidence, "axes": found} if found else None


def _gain_at(pairs: Sequence[tuple[RunRows, float, RunRows, float]], confidence: float) -> Json | None:
    """Gains over one budget of (run, its use per token, other run, its use per token)."""
    lines, seeds = [], []
    for run, rate, other, other_rate in pairs:
        steps, tokens, bits = evaluations(run)
        _, other_tokens, other_bits = evaluations(other)
        known = np.isfinite(other_bits)
        if known.sum() < 2:
            return None
        x, at = np.log(tokens * rate), np.log(other_tokens[known] * other_rate)
        inside = (x >= at[0] - 1e-9) & (x <= at[-1] + 1e-9)
        gain = np.interp(x, at, other_bits[known]) - bits
        lines.append(
            {int(s): (u, g) for s, u, g in zip(steps[inside], (tokens * rate)[inside], gain[inside], strict=True)}
        )
        seeds.append(run.config["seed"])
    common = sorted(set.intersection(*map(set, lines))) if lines else []
    if not common:
        return None
    x_SN = np.array([[line[step][0] for step in common] for line in lines])
    gain_SN = np.array([[line[step][1] for step in common] for line in lines])
    ends = [t_interval(column.tolist(), confidence) if np.isfinite(column).all() else None for column in gain_SN.T]
    middle = [math.nan if one is None else one.mean for one in ends]
    low, high = (
        [math.nan if one is None or (v := getattr(one, end)) is None else v for one in ends] for end in ("low", "high")
    )
    return {
        "steps": common,
        "x": brief(x_SN.mean(0)),
        "runs": [{"seed": seed, "gain": brief(gain)} for seed, gain in zip(seeds, gain_SN, strict=True)],
        "mean": brief(middle),
        "low": brief(low),
        "high": brief(high),
        "frame": _gain_frame(gain_SN),
    }


def _gain_frame(gain_SN: np.ndarray) -> list[float] | None:
    """The range of the later half's gains with a margin, zero inside; a wide interval may leave it."""
    late = gain_SN[:, gain_SN.shape[1] // 4 :]
    finite = late[np.isfinite(late)]
    if not finite.size:
        return None
    low, high = min(0.0, float(finite.min())), max(0.0, float(finite.max()))
    margin = 0.25 * (high - low) or 0.01
    return [low - margin, high + margin]
