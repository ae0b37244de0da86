"""Is one arm better than the other? Differences are paired by seed: seeds vary more than the effects of interest.

Throughout, a gain is dense minus sparse in bits per byte: positive means that the sparse model is better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from moe.analysis.rows import FinalRows
from moe.errors import UserError

Verdict = Literal["ahead", "behind", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided Student t interval over seeds; one value has no interval: low and high are None."""

    values: tuple[float, ...]
    mean: float
    deviation: float | None
    """Sample standard deviation of the values (n - 1)."""
    low: float | None
    high: float | None
    confidence: float

    @property
    def verdict(self) -> Verdict:
        """`ahead` if the whole interval is above 0, `behind` if below; anything else is undecided."""
        if self.low is None or self.high is None:
            return "undecided"
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "undecided"


@dataclass(frozen=True)
class EvaluationNoise:
    """How far one pair's gain could move had other validation rows been drawn; says nothing about other seeds."""

    gain: float
    """Bits per byte, dense minus sparse."""
    standard_error: float
    half_width: float
    """Half of the t interval over rows."""
    rows: int
    bytes: float


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of values ± t_{n-1} · s / sqrt(n), the interval of a normal mean with unknown variance (Student 1908)."""
    if not values or not all(math.isfinite(value) for value in values):
        raise UserError(f"an interval needs finite values, found {list(values)}: see the runs' summary.json.")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(tuple(values), mean, None, None, None, confidence)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(tuple(values), mean, deviation, mean - half, mean + half, confidence)


def paired_gain(dense: Sequence[float], sparse: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of the per-seed differences dense[i] - sparse[i]; both in bits per byte, in the order of the seeds."""
    if len(dense) != len(sparse):
        raise UserError(f"pairing needs one dense run per sparse run, found {len(dense)} and {len(sparse)}.")
    return t_interval([d - s for d, s in zip(dense, sparse, strict=True)], confidence)


def evaluation_noise(dense: FinalRows, sparse: FinalRows, confidence: float = 0.95) -> EvaluationNoise:
    """Standard error of one pair's gain over validation rows, with the ratio estimator sum(nats) / sum(bytes).

    s.e. = sqrt(n / (n - 1) · Σ (d_i - g·b_i)²) / Σ b_i (Cochran 1977, section 2.11), d_i the row's difference in bits,
    b_i its bytes, g the gain. Raises UserError unless both runs were evaluated on the same rows.
    """
    if dense.bytes.shape != sparse.bytes.shape or not np.array_equal(dense.bytes, sparse.bytes):
        raise UserError(
            f"the two runs were evaluated on different rows ({dense.bytes.size} rows of {dense.bytes.sum():,.0f} "
            "bytes, "
            f"{sparse.bytes.size} rows of {sparse.bytes.sum():,.0f} bytes): a pair needs one data config."
        )
    difference, n, total = (dense.nats - sparse.nats) / math.log(2), dense.bytes.size, dense.bytes.sum()
    gain = difference.sum() / total
    if n == 1:
        return EvaluationNoise(float(gain), math.nan, math.nan, n, float(total))
    squares = np.square(difference - gain * dense.bytes).sum()
    error = math.sqrt(n / (n - 1) * squares) / total
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    return EvaluationNoise(float(gain), float(error), half, n, float(total))


def ratio_interval(amount_R: np.ndarray, number_R: np.ndarray) -> tuple[float, float, float]:
    """Σ amounts / Σ numbers and its 95 % interval, rows being the independent units: a difference per token, nats per byte, ..."""
    total, R = number_R.sum(), len(number_R)
    mean = float(amount_R.sum() / total)
    residual = amount_R - mean * number_R
    error = math.sqrt(float((residual**2).sum()) * R / max(R - 1, 1)) / total
    half = float(stats.t.ppf(0.975, max(R - 1, 1))) * error
    return mean, mean - half, mean + half
