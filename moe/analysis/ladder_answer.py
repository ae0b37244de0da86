"""From a finished ladder to an answer: the gain at the target, what that is worth in compute, and go or no-go.

Pure functions over final losses. The gain is what `ladder.py` predicts, less the optimism that back-tests have shown: of
this ladder where it is long enough, else of published ones. Its interval adds, in squares, what back-tests missed by and
the scatter of this ladder's own runs around their lines.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from moe.analysis.ladder import FORMS, Form, Ladder, Optimism, measure_optimism, naive, predict
from moe.analysis.published import OPTIMISM, PublishedOptimism
from moe.analysis.scaling import PowerLaw, fit_power_law
from moe.errors import DataError

Json = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """The run that the ladder is asked about."""

    size: float
    """Active parameters, as the ladder counts its sizes."""
    experts: float
    """Experts over experts used, as the ladder counts them."""
    compute: float
    """Training FLOPs of a dense run of this size on the tokens that the answer is about."""


@dataclass(frozen=True)
class Tax:
    """Step time of the sparse model over that of its dense twin, with an interval."""

    mean: float
    low: float
    high: float


def answer(
    ladder: Ladder,
    compute: Mapping[float, float],
    target: Target,
    tax: Tax,
    *,
    break_even: float = 0.0,
    confidence: float = 0.9,
) -> Json:
    """Gain in nats per token at the target, its worth in dense compute, net of the step-time tax, against a break-even.

    compute: training FLOPs of each size's dense run. One router, one row of the ladder per (size, experts): its mean over seeds.
    The answer is the middle of both forms (of the law alone where no rung has the target's number of experts).
    Raises DataError for fewer than three sizes or three numbers of experts.
    """
    sizes, counts = np.unique(ladder.size_R), np.unique(ladder.experts_R)
    if sizes.size < 3 or counts.size < 3:
        raise DataError(
            f"a ladder needs 3 sizes and 3 numbers of experts, found {sizes.size} and {counts.size}: add rungs."
        )
    dense = fit_power_law(np.array(list(compute.values())), np.array([_dense_loss(ladder, n) for n in compute]))
    scatter = line_scatter(ladder, target.size, confidence)
    forms = {form: _form(ladder, target, form, scatter, confidence) for form in FORMS}
    found = combine(forms, confidence)
    router = ladder.router_R[:1]
    return {
        "form": found["form"],
        "confidence": confidence,
        "target": {"size": target.size, "experts": target.experts, "compute": target.compute},
        "reach": math.log(target.size / sizes[-1]),
        "scatter": scatter,
        "forms": forms,
        "naive": float(naive(ladder, router, np.array([target.experts]))[0]),
        "dense_law": {"beta": dense.alpha, "d": dense.d, "rmse": dense.rmse, "loss": float(dense.loss(target.compute))},
        **{name: found[name] for name in ("gain", "low", "high")},
        "interval_from": shares(found["squares"]),
        "multiplier": multiplier(dense, target.compute, found),
        "net": net_gain(dense, target.compute, found, tax, break_even),
        "check": hold_out_largest(ladder),
    }


def combine(forms: Mapping[str, Json | None], confidence: float) -> Json:
    """Both forms as one: their mean, with the line's half-width and half their distance (as a deviation) added in squares.

    Neither is the truth: where the gain follows the law a line falls short of it, and public curves bend below both.
    """
    known = [(name, form) for name, form in forms.items() if form is not None]
    if not known:
        raise DataError(
            "no rung has the target's number of experts, and the ladder has too few runs for the law: add that number to "
            "--experts."
        )
    gain = math.fsum(form["gain"] for _, form in known) / len(known)
    apart = max(form["gain"] for _, form in known) - gain
    first = known[0][1]
    half = math.hypot(first["high"] - first["gain"], float(stats.norm.ppf(0.5 + confidence / 2)) * apart)
    form = "both" if len(known) == 2 else known[0][0]
    squares = {**first["squares"], "the distance of the two forms": half**2 - (first["high"] - first["gain"]) ** 2}
    return {"form": form, "gain": gain, "low": gain - half, "high": gain + half, "squares": squares}


def shares(squares: Mapping[str, float]) -> dict[str, float]:
    """Shares of an interval's squared half-width by what made it; all 0 for an interval without width."""
    total = math.fsum(squares.values())
    return {name: value / total if total else 0.0 for name, value in squares.items()}


def optimism_of(ladder: Ladder, form: Form, gain: float, confidence: float) -> tuple[Optimism, str]:
    """The ladder's own optimism, or a published one in proportion to the gain; and which of them it is."""
    try:
        return measure_optimism(ladder, form, confidence), "this ladder"
    except DataError:
        known: PublishedOptimism = OPTIMISM[form]
        spread = float(np.interp(confidence, known.levels, known.spreads)) * abs(gain)
        return Optimism(known.share, spread, known.misses, confidence), "published"


def _form(ladder: Ladder, target: Target, form: Form, scatter: float, confidence: float) -> Json | None:
    """One form's prediction before and after its correction; None where it cannot say."""
    try:
        guess = float(predict(ladder, target.size, ladder.router_R[:1], np.array([target.experts]), form)[0])
    except DataError:
        return None
    if not math.isfinite(guess):
        return None
    reach = math.log(target.size / ladder.size_R.max())
    optimism, source = optimism_of(ladder, form, guess, confidence)
    gain = guess - min(1.0, optimism.share * reach) * abs(guess)
    back = max(0.0, reach) * optimism.spread
    half = math.hypot(back, scatter)
    return {
        "before": guess,
        "gain": gain,
        "low": gain - half,
        "high": gain + half,
        "squares": {"what back-tests missed by": back**2, "the scatter of this ladder's runs": scatter**2},
        "optimism": {
            "source": source,
            "share": optimism.share,
            "spread": optimism.spread,
            "back_tests": optimism.misses,
        },
    }


def line_scatter(ladder: Ladder, size: float, confidence: float) -> float:
    """Half-width of a new run's interval around the line in log size, from the residuals of all lines of the ladder.

    Lines of several numbers of experts share the noise of each size's dense run, so only the sizes count as independent.
    """
    squares, freedom, leverage = 0.0, 0, 1.0
    for experts in np.unique(ladder.experts_R):
        rows = ladder.take(ladder.experts_R == experts)
        x, y = np.log(rows.size_R), rows.gain_R
        if x.size < 3:
            continue
        slope, level = np.polyfit(x, y, 1)
        squares += float(np.square(y - slope * x - level).sum())
        freedom += x.size - 2
        reach = (math.log(size) - x.mean()) ** 2 / float(np.square(x - x.mean()).sum())
        leverage = max(leverage, 1 + 1 / x.size + reach)
    if not freedom:
        return 0.0
    independent = max(1, min(freedom, 2 * (np.unique(ladder.size_R).size - 2)))
    return float(stats.t.ppf(0.5 + confidence / 2, independent)) * math.sqrt(squares / freedom * leverage)


def expected_width(sizes: Sequence[float], size: float, seeds: int, confidence: float) -> tuple[float, float]:
    """Half-width of the interval before anything is trained: (as a share of the gain, and in deviations of one run's loss).

    The first is what published back-tests missed by, the second the scatter of runs of these sizes around a line.
    """
    known, x = OPTIMISM["linear"], np.log(sizes)
    reach = max(0.0, math.log(size) - x.max())
    leverage = 1 + 1 / x.size + (math.log(size) - x.mean()) ** 2 / float(np.square(x - x.mean()).sum())
    t = float(stats.t.ppf(0.5 + confidence / 2, max(1, 2 * (x.size - 2))))
    return reach * float(np.interp(confidence, known.levels, known.spreads)), t * math.sqrt(2 * leverage / seeds)


def multiplier(dense: PowerLaw, compute: float, gain: Json) -> Json:
    """What a dense run would need in FLOPs for the loss of the sparse one, over what it has; null where no compute helps."""

    def factor(nats: float) -> float | None:
        loss = float(dense.loss(compute))
        if dense.alpha <= 0 or nats >= loss:
            return None
        return math.exp(min(700.0, -math.log1p(-nats / loss) / dense.alpha))

    return {"value": factor(gain["gain"]), "low": factor(gain["low"]), "high": factor(gain["high"])}


def net_gain(dense: PowerLaw, compute: float, gain: Json, tax: Tax, break_even: float) -> Json:
    """The gain at equal time: the dense run trains `tax` times as long meanwhile. Go if its whole interval is above the break-even.

    Errors of gain and tax are taken as independent.
    """
    loss = float(dense.loss(compute))

    def price(factor: float) -> float:
        return loss * -math.expm1(-max(0.0, dense.alpha) * math.log(factor))

    middle = gain["gain"] - price(tax.mean)
    low = middle - math.hypot(gain["gain"] - gain["low"], price(tax.high) - price(tax.mean))
    high = middle + math.hypot(gain["high"] - gain["gain"], price(tax.mean) - price(tax.low))
    return {
        "gain": middle,
        "low": low,
        "high": high,
        "tax": {"mean": tax.mean, "low": tax.low, "high": tax.high, "nats": price(tax.mean)},
        "break_even": break_even,
        "verdict": "go" if low > break_even else "no-go",
        "decided": low > break_even or high <= break_even,
    }


def hold_out_largest(ladder: Ladder) -> Json:
    """The largest rung predicted from the smaller ones by the line and by the rung below it, and how wrong that was."""
    top = ladder.size_R.max()
    below, new = ladder.take(ladder.size_R < top), ladder.take(ladder.size_R == top)
    line_R = predict(below, float(top), new.router_R, new.experts_R, "linear")
    same_R = naive(below, new.router_R, new.experts_R)
    reach = math.log(top / below.size_R.max())
    middle_R = line_R - OPTIMISM["linear"].share * reach * np.abs(line_R)
    rows = [
        {"experts": float(e), "gain": float(g), "line": _number(p), "corrected": _number(m), "naive": _number(n)}
        for e, g, p, m, n in zip(new.experts_R, new.gain_R, line_R, middle_R, same_R, strict=True)
    ]
    return {"size": float(top), "reach": reach, "runs": rows}


def _dense_loss(ladder: Ladder, size: float) -> float:
    return float(ladder.dense_R[ladder.size_R == size].mean())


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
