"""A test that may be looked at after every sequence: has the sparse model's gain fallen below what was promised?

d_i is dense minus sparse loss of the i-th evaluation sequence, promise the expected gain. Under the hypothesis "each
difference has a mean of at least the promise, given those before", a gambler who bets on less,

    wealth_n = mean over λ of Π_{i <= n} (1 + λ (promise - d_i)),   0 < λ < 1 / bound,

has no expected profit, so P(wealth ever reaches 1/α) <= α (Ville 1939; Waudby-Smith and Ramdas 2024, section 4). The
mean over a grid of stakes λ needs no tuning and stays within a factor of the best stake. No calibration runs, no
normality, and no fixed number of looks; but every sequence must be a fresh one.
"""

import math
from dataclasses import dataclass

import numpy as np

from moe.errors import UserError

STAKES = np.geomspace(0.01, 0.95, 12)
"""Stakes λ in units of 1 / bound."""


@dataclass(frozen=True)
class Betting:
    """Outcome of a monitored stream of differences."""

    wealth_N: np.ndarray
    """After each sequence: evidence against the promise, 1 at the start."""
    alarm: int | None
    """Number of sequences after which the alarm was raised; None if it was not."""
    clipped: int
    """Sequences whose sparse loss was worse than `bound` below the promise, counted as just that bad."""


def log_wealth(promise_N: np.ndarray | float, difference_N: np.ndarray, bound: float) -> np.ndarray:
    """Natural log of the wealth after each sequence; the last axis is time, others are separate streams.

    Differences far below the promise are clipped at promise - bound, which makes the alarm later and never wrong; one
    above promise + bound cannot be allowed for afterwards. Raises UserError then, for values that are not finite, and for
    a bound that is not positive.
    """
    if not (bound > 0 and math.isfinite(bound)):
        raise UserError(f"bound ({bound:g}) must be positive: how far one sequence's gain may lie from the promise.")
    shortfall_N = promise_N - np.asarray(difference_N, float)
    if not np.all(np.isfinite(shortfall_N)):
        raise UserError(
            "differences and promise must be finite: a sequence without a finite loss is a failure by itself."
        )
    if shortfall_N.size and shortfall_N.min() < -bound:
        raise UserError(
            f"a sequence gains {-shortfall_N.min():.4g} more than the promise, above the bound ({bound:g}): choose the "
            "bound before the run, and a larger one."
        )
    shortfall_N = np.minimum(shortfall_N, bound) / bound
    total_N = np.full(shortfall_N.shape, -np.inf)
    for stake in STAKES:
        total_N = np.logaddexp(total_N, np.cumsum(np.log1p(stake * shortfall_N), -1))
    return total_N - math.log(STAKES.size)


def monitor(
    promise: np.ndarray | float, difference_N: np.ndarray, *, bound: float, false_alarm_rate: float = 0.05
) -> Betting:
    """Watch one stream of paired differences, in nats per token, in the order of evaluation.

    `promise` is one number or one per sequence (it may change from evaluation to evaluation); to allow for the noise of
    seeds, promise less. Raises UserError as `log_wealth` does, and for a rate outside (0, 1).
    """
    if not 0 < false_alarm_rate < 1:
        raise UserError(f"false_alarm_rate ({false_alarm_rate:g}) must lie between 0 and 1: e.g. 0.05.")
    logs_N = log_wealth(promise, difference_N, bound)
    reached = np.flatnonzero(logs_N >= -math.log(false_alarm_rate))
    clipped = int(np.sum(promise - np.asarray(difference_N, float) > bound))
    return Betting(np.exp(np.minimum(logs_N, 700.0)), int(reached[0]) + 1 if reached.size else None, clipped)
