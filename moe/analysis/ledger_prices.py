"""Prices of loss: what the next hundredth of a nat costs a run, and what a run's loss would have cost a dense one.

Loss is read against tokens D. Near the end of a run it is taken as a line in ln D, fitted by least squares to the evaluations of
the last half of its tokens: L = l - s·ln D. The slope includes what the decay of the learning rate adds, so it flatters both
prices; they say what more tokens under the same kind of schedule may cost, not what an undecayed run would gain.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from moe.analysis.ledger import AMOUNTS, UNITS, account, amount
from moe.analysis.paired import t_interval
from moe.analysis.rows import EVALS, METRICS, Json, read_json, read_lines
from moe.config.schema import Cost
from moe.errors import UserError

LEAST = 4
"""Evaluations that a slope with an interval needs."""


@dataclass(frozen=True)
class Tail:
    """The end of a loss curve as a line in ln D."""

    slope: float
    """Nats per factor e of tokens; positive while the loss falls."""
    low: float
    high: float
    """Ends of the slope's interval."""
    tokens: float
    """D at the end."""
    evaluations: int


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, validation loss in nats) of a run's evaluations during training, finite ones, ascending."""
    tokens = {
        row["step"]: row["tokens"] for row in read_lines(folder / "metrics.jsonl", METRICS, lambda r: (r["step"],))
    }
    evals = read_lines(
        folder / "evals.jsonl", {**EVALS, "loss": (int, float, type(None))}, lambda r: (r["step"], r["final"])
    )
    points = [
        (tokens[row["step"]], row["loss"])
        for row in evals
        if not row["final"] and row["loss"] is not None and row["step"] in tokens
    ]
    return np.array([t for t, _ in points], float), np.array([loss for _, loss in points], float)


def tail(tokens: np.ndarray, loss: np.ndarray, confidence: float = 0.9) -> Tail:
    """Least squares of loss on ln D over the last half of the tokens, with Student's interval of the slope.

    Raises UserError for fewer than 4 evaluations there.
    """
    late = tokens >= tokens.max(initial=0) / 2
    n = int(late.sum())
    if n < LEAST:
        raise UserError(
            f"a slope needs {LEAST} evaluations in the last half of training, found {n}: set evaluation.every_steps lower."
        )
    x, y = np.log(tokens[late]), loss[late]
    spread = float(np.square(x - x.mean()).sum())
    slope = float(((x - x.mean()) * y).sum()) / spread
    rest = float(np.square(y - y.mean() - slope * (x - x.mean())).sum())
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 2)) * math.sqrt(rest / (n - 2) / spread)
    return Tail(-slope, -slope - half, -slope + half, float(tokens[-1]), n)


def has_tail(folder: Path) -> bool:
    """Whether a run has evaluations enough for the slope of its end."""
    tokens, _ = curve(folder)
    return int((tokens >= tokens.max(initial=0) / 2).sum()) >= LEAST


def share_for(nats: float, slope: float) -> float | None:
    """Tokens that take the loss down by `nats`, over those spent: e^(nats/slope) - 1; None where the loss does not fall."""
    return math.expm1(nats / slope) if slope > 0 and nats / slope < 100 else None


def next_nats(folder: Path, nats: float = 0.01, cost: Cost | None = None) -> Json:
    """What the next `nats` cost a run that goes on as it ended: of each amount [low, middle, high], null where unbounded.

    An amount per token is the run's total over all tokens it has processed, evaluation and lost work included.
    """
    spent, end = account(folder, cost), tail(*curve(folder))
    shares = [share_for(nats, slope) for slope in (end.high, end.slope, end.low)]
    if not spent["tokens"]:
        raise UserError(f"{folder / 'ledger.jsonl'} has no step: a price of loss needs some.")
    per_token = {name: spent[name]["value"] / spent["tokens"] for name in AMOUNTS if spent[name] is not None}
    return {
        "nats": nats,
        "slope": end.slope,
        "slope_interval": [end.low, end.high],
        "evaluations": end.evaluations,
        "tokens": [None if share is None else share * end.tokens for share in shares],
        **{
            name: [None if share is None else share * end.tokens * price for share in shares]
            for name, price in per_token.items()
        },
    }


def tokens_to(tokens: np.ndarray, loss: np.ndarray, target: float) -> tuple[float | None, bool]:
    """Tokens at which a curve first is at `target` and stays there, and whether that lies beyond its end.

    Between evaluations linear in ln D; beyond them by the tail's slope; None where the loss does not fall.
    """
    above = np.flatnonzero(loss > target)
    if not above.size:
        return float(tokens[0]), False
    last = int(above[-1])
    if last + 1 < loss.size:
        x, y = np.log(tokens[last : last + 2]), loss[last : last + 2]
        return float(np.exp(x[0] + (y[0] - target) / (y[0] - y[1]) * (x[1] - x[0]))), False
    share = share_for(float(loss[-1]) - target, tail(tokens, loss).slope)
    return (None if share is None else float(tokens[-1]) * (1 + share)), True


def equal_loss(folder: Path, dense: Path, cost: Cost | None = None) -> Json:
    """What a dense run costs at the loss that `folder` ended with, over what `folder` cost: above 1, sparsity was cheaper.

    The dense run's own curve is read, at its own learning rates: one that was planned to end there would have been a little
    better, so the ratios lean towards the sparse run.
    """
    spent, other = account(folder, cost), account(dense, cost)
    if not other["tokens"]:
        raise UserError(f"{dense / 'ledger.jsonl'} has no step: a price of loss needs some.")
    (_, loss), other_curve = curve(folder), curve(dense)
    for run, losses in ((folder, loss), (dense, other_curve[1])):
        if not losses.size:
            raise UserError(f"{run} has no evaluation during training: set evaluation.every_steps.")
    needed, beyond = tokens_to(*other_curve, float(loss[-1]))
    ratios: Json = {}
    for name in AMOUNTS:
        if spent[name] is None or other[name] is None or needed is None or not spent[name]["value"]:
            ratios[name] = None
        else:
            ratios[name] = other[name]["value"] * needed / other["tokens"] / spent[name]["value"]
    again = spent["repeated_seconds"] / spent["seconds"]["value"] if spent["seconds"]["value"] else 0.0
    return {
        "loss": float(loss[-1]),
        "dense_tokens": needed,
        "extrapolated": beyond,
        "repeated_share": again,
        "ratios": ratios,
    }


def of_comparison(folder: Path, nats: float = 0.01, cost: Cost | None = None) -> Json:
    """Both prices of a whole comparison: cost at equal loss paired by seed, and the next `nats` of each arm.

    `ratios`: of each amount the geometric mean over seeds with its 95 % interval (null where a seed lacks it); `next`: of each
    arm the median over seeds, null where a run's loss does not fall. `why`: what keeps a price from being known.
    """
    arms = read_json(folder / "compare.json", {"arms": (dict,)})["arms"]
    runs = {arm: [folder / name for name in arms[arm]] for arm in ("sparse", "dense")}
    result: Json = {"seeds": len(runs["sparse"]), "ratios": None, "next": {}, "nats": nats, "why": []}
    try:
        found = [equal_loss(*pair, cost) for pair in zip(runs["sparse"], runs["dense"], strict=True)]
        result["ratios"] = {name: _geometric([one["ratios"][name] for one in found]) for name in AMOUNTS}
        result["extrapolated"] = sum(one["extrapolated"] for one in found)
    except UserError as error:
        result["why"].append(str(error))
    for arm, folders in runs.items() if nats else ():
        try:
            ends = [next_nats(run, nats, cost) for run in folders]
        except UserError as error:
            result["why"].append(str(error))
            continue
        result["next"][arm] = {name: _median([end.get(name, [None] * 3)[1] for end in ends]) for name in AMOUNTS}
    return result


def _geometric(ratios: list[float | None]) -> Json | None:
    known = [math.log(ratio) for ratio in ratios if ratio]
    if len(known) < len(ratios):
        return None
    found = t_interval(known)
    ends = (found.mean, found.low, found.high)
    mean, low, high = (None if end is None else math.exp(end) for end in ends)
    return {"values": ratios, "mean": mean, "low": low, "high": high}


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known and len(known) == len(values) else None


def describe_next(result: Json) -> str:
    """`next_nats` in words."""

    def between(name: str, unit: str) -> str:
        low, middle, high = result[name]
        if middle is None:
            return f"unbounded {unit}"
        ends = f"[{amount({'value': low}, unit)}, {'unbounded' if high is None else amount({'value': high}, unit)}]"
        return f"{amount({'value': middle}, unit)} {ends}"

    known = [name for name in ("tokens", *AMOUNTS) if name in result and name != "device_hours"]
    parts = ", ".join(between(name, UNITS.get(name, name)) for name in known)
    return (
        f"the next {result['nats']:g} nats cost {parts}; from the slope of the last {result['evaluations']} evaluations, "
        f"{result['slope']:.4f} nats per factor e of tokens (90 % intervals)"
    )


def describe_equal(result: Json) -> str:
    """`equal_loss` in words."""
    if result["dense_tokens"] is None:
        return f"the dense run's loss no longer falls, so it never gets to {result['loss']:.4f} nats"
    ratios = ", ".join(f"{value:.3g} × the {name}" for name, value in result["ratios"].items() if value is not None)
    how = "beyond its end, by the slope of its tail" if result["extrapolated"] else "on its curve"
    again = result["repeated_share"]
    lost = f"; {again:.0%} of the sparse run's time was work done again, which is in it" if again else ""
    return (
        f"to {result['loss']:.4f} nats the dense run needs {result['dense_tokens']:,.0f} tokens ({how}): {ratios}{lost}"
    )


def describe_comparison(result: Json) -> str:
    """`of_comparison` in words."""
    lines = []
    if result["ratios"]:
        parts = []
        for name, ratio in result["ratios"].items():
            if ratio is not None:
                ends = "" if ratio["low"] is None else f" [{ratio['low']:.3g}, {ratio['high']:.3g}]"
                parts.append(f"{ratio['mean']:.3g}{ends} × the {name}")
        beyond = f"; {result['extrapolated']} beyond the dense curve" if result["extrapolated"] else ""
        lines.append(f"at equal loss dense costs {', '.join(parts)} ({result['seeds']} seeds, paired{beyond})")
    for arm, prices in result["next"].items():
        known = [amount({"value": value}, UNITS[name]) for name, value in prices.items() if value is not None]
        text = ", ".join(known) if known else "are out of reach: the loss no longer falls"
        lines.append(f"the next {result['nats']:g} nats of the {arm} arm cost {text} (median over seeds)")
    return "\n".join([*lines, *(f"not known: {why}" for why in result["why"])])
