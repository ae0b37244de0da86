"""Does sparsity pay, and at equal what? A verdict for each contract, from one sparse model and two dense ones.

The dense twins are `active` (equal FLOPs per token) and `total` (equal parameters in all). A contract holds one resource x
equal: the dense loss at the sparse model's x is interpolated between the twins, or extrapolated a little beyond them, as a
power law through the two: ln L linear in ln x, seed by seed (so the same interpolation serves parameters, FLOPs, bytes,
seconds, joules and dollars, each of which grows as a power of size between the twins). Losses are paired by seed; gains are dense
minus sparse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe.analysis.paired import Interval, t_interval
from moe.errors import UserError

Json = dict[str, Any]
CONTRACTS = {
    "active_parameters": "equal active parameters",
    "flops": "equal FLOPs",
    "total_parameters": "equal total parameters",
    "memory": "equal memory",
    "seconds": "equal wall-clock",
    "joules": "equal energy",
    "dollars": "equal cost",
}
SAME = 0.01
"""Resources that differ by less are the same: the twin itself is the comparison, nothing is interpolated."""
FAR = 0.5
"""How far beyond the twins the power law is still believed, as a share of their distance in ln x."""
WORDS = {"ahead": "win", "behind": "loss", "undecided": "undecided"}


@dataclass(frozen=True)
class Arm:
    """One kind of model over the seeds of a comparison."""

    name: str
    loss_S: np.ndarray
    """Final validation loss of each seed, in the comparison's order and in one unit for all arms."""
    resources: Mapping[str, float]
    """Of each contract's resource, what a run takes (mean of seeds); what is not known is left out."""


def interpolated(x: float, x_pair: tuple[float, float], low_S: np.ndarray, high_S: np.ndarray) -> np.ndarray:
    """Loss per seed at resource x of the power law through (x_pair[0], low_S) and (x_pair[1], high_S)."""
    share = math.log(x / x_pair[0]) / math.log(x_pair[1] / x_pair[0])
    return np.exp((1 - share) * np.log(low_S) + share * np.log(high_S))


def judge(contract: str, sparse: Arm, active: Arm, total: Arm | None, confidence: float = 0.95) -> Json:
    """The verdict at one contract: win, loss or undecided, with the paired interval of the gain and where it comes from.

    `verdict` is null where it cannot be had, and `why` says why.
    """
    result: Json = {"contract": contract, "name": CONTRACTS[contract], "verdict": None}
    resources = [arm.resources.get(contract) for arm in (sparse, active, total) if arm is not None]
    if any(not value for value in resources):
        return result | {"why": "a run does not know this resource"}
    x, at_active, *rest = (float(value) for value in resources if value is not None)
    result |= {"sparse": x, "active": at_active, "total": rest[0] if rest else None}
    if abs(math.log(x / at_active)) < SAME:
        dense_S, how = active.loss_S, "the active twin itself"
    elif total is not None and abs(math.log(x / rest[0])) < SAME:
        dense_S, how = total.loss_S, "the total twin itself"
    elif total is None:
        return result | {"why": "needs the dense twin of equal total parameters"}
    elif abs(math.log(rest[0] / at_active)) < SAME:
        return result | {"why": "the dense twins do not differ in this resource, so there is no curve between them"}
    else:
        share = math.log(x / at_active) / math.log(rest[0] / at_active)
        if not -FAR <= share <= 1 + FAR:
            return result | {"why": f"{x:.3g} lies too far beyond the twins' {at_active:.3g} and {rest[0]:.3g}"}
        dense_S = interpolated(x, (at_active, rest[0]), active.loss_S, total.loss_S)
        how = "the twins, interpolated between them" if 0 <= share <= 1 else "the twins, extrapolated beyond them"
    gain = t_interval((dense_S - sparse.loss_S).tolist(), confidence)
    return result | {"verdict": WORDS[gain.verdict], "from": how, "gain": _json(gain), "dense_loss": dense_S.tolist()}


def effective_size(sparse: Arm, active: Arm, total: Arm, confidence: float = 0.95) -> Json:
    """Parameters of the dense model with the sparse one's loss, by the power law through the twins: geometric mean, interval.

    Null where a larger dense model was not better, so that there is no law.
    """
    sizes = [arm.resources["total_parameters"] for arm in (active, total)]
    slope_S = np.log(total.loss_S / active.loss_S)
    if (slope_S >= 0).any():
        return {"parameters": None, "why": "the larger dense twin is not better with every seed"}
    log_S = np.log(sparse.loss_S / active.loss_S) / slope_S * math.log(sizes[1] / sizes[0])
    over_active = _json(t_interval(log_S.tolist(), confidence), exp=True)
    return {
        "parameters": over_active["mean"] * sizes[0],
        "low": None if over_active["low"] is None else over_active["low"] * sizes[0],
        "high": None if over_active["high"] is None else over_active["high"] * sizes[0],
        "over_active": over_active["mean"],
        "over_total": over_active["mean"] * sizes[0] / sizes[1],
    }


# -------------------------------------------------------------------------------------------------------------- speed


def net_speed(multiplier: Interval, tax: Interval) -> Json:
    """Compute multiplier at equal loss over step-time tax, both given as natural logarithms.

    Independent errors: half-widths add in squares. No single number where the interval contains 1, nor without one.
    """
    mean = multiplier.mean - tax.mean
    result: Json = {"multiplier": _json(multiplier, exp=True), "tax": _json(tax, exp=True)}
    if multiplier.low is None or tax.low is None:
        return result | {"net": None, "low": None, "high": None, "verdict": "undecided"}
    half = math.hypot(multiplier.mean - multiplier.low, tax.mean - tax.low)
    low, high = mean - half, mean + half
    verdict = "win" if low > 0 else "loss" if high < 0 else "undecided"
    net = None if verdict == "undecided" else math.exp(mean)
    return result | {"net": net, "low": math.exp(low), "high": math.exp(high), "verdict": verdict}


def log_ratio(numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of ln(numerator/denominator) over pairs: of step times, one pair per interleaved round."""
    return t_interval([math.log(a / b) for a, b in zip(numerator, denominator, strict=True)], confidence)


# ------------------------------------------------------------------------------------------------------------ crossing


def crossover(sparse: tuple[np.ndarray, np.ndarray], dense: tuple[np.ndarray, np.ndarray]) -> Json:
    """Where along x the sparse curve gets ahead of the dense one for good; curves are (x, loss), linear in ln x between points.

    `state`: `ahead` from the first common point on, `crosses` at `at`, or `behind` at the end.
    """
    low, high = max(sparse[0][0], dense[0][0]), min(sparse[0][-1], dense[0][-1])
    grid = np.unique(np.concatenate([sparse[0], dense[0]]))
    grid = grid[(grid >= low) & (grid <= high)]
    if grid.size < 2:
        raise UserError("the two curves share fewer than two points: evaluate more often (evaluation.every_steps).")
    gain = _at(grid, dense) - _at(grid, sparse)
    behind = np.flatnonzero(gain <= 0)
    if not behind.size:
        return {"state": "ahead", "at": None}
    last = int(behind[-1])
    if last == grid.size - 1:
        return {"state": "behind", "at": None}
    share = -gain[last] / (gain[last + 1] - gain[last])
    return {"state": "crosses", "at": float(grid[last] * (grid[last + 1] / grid[last]) ** share)}


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds of curves evaluated at the same steps; their x (tokens) may differ by SAME, as batches of seeds do."""
    x_Sn = [x for x, _ in curves]
    if any(x.shape != x_Sn[0].shape or not np.allclose(x, x_Sn[0], rtol=SAME, atol=0) for x in x_Sn):
        raise UserError("the seeds of one arm were evaluated at different steps: compare runs of one config.")
    return np.mean(x_Sn, axis=0), np.mean([loss for _, loss in curves], axis=0)


def _at(x: np.ndarray, curve: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.interp(np.log(x), np.log(curve[0]), curve[1])


# ------------------------------------------------------------------------------------------------------- decomposition


def decompose(sparse: Arm, dense: Arm, without_routing: Arm, confidence: float = 0.95) -> Json:
    """The gain over dense as capacity (experts, with a router that learns nothing) plus routing (what learning it adds).

    Paired intervals of both; `share` is capacity over the whole gain, null unless the whole gain is decided.
    """
    whole = t_interval((dense.loss_S - sparse.loss_S).tolist(), confidence)
    capacity = t_interval((dense.loss_S - without_routing.loss_S).tolist(), confidence)
    routing = t_interval((without_routing.loss_S - sparse.loss_S).tolist(), confidence)
    share = capacity.mean / whole.mean if whole.verdict != "undecided" else None
    return {
        "twin": without_routing.name,
        "gain": _json(whole),
        "capacity": _json(capacity),
        "routing": _json(routing),
        "share": share,
    }


def _json(interval: Interval, *, exp: bool = False) -> Json:
    """values, mean, low, high; with `exp` of logarithms."""

    def turn(value: float | None) -> float | None:
        return math.exp(value) if exp and value is not None else value

    return {
        "values": [turn(value) for value in interval.values],
        "mean": turn(interval.mean),
        "low": turn(interval.low),
        "high": turn(interval.high),
        "confidence": interval.confidence,
    }
