"""Scaling laws of routed language models at a fixed number of tokens: fitted to final losses, with numpy and scipy.

The law of Clark et al. 2022 (arXiv 2202.01169, equations 7 and 11) with N active parameters and E experts:

    log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d,   1/Ê = 1/(E - 1 + (1/E_start - 1/E_max)⁻¹) + 1/E_max

and two simpler forms: dense loss as a power of N, and the gain over dense as linear in log N for each E.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from moe.analysis.curves import Curve
from moe.errors import DataError

STARTS = ((0.2, 4.6), (0.2, 6.0), (1.1, 4.6), (1.1, 6.0))
"""Starting points of (ln E_start, ln(E_max - E_start)): the sum of squares is not convex in them."""
BOUNDS = ((-2.0, 0.0), (4.0, 10.0))
"""Their limits: E_start from 0.14 to 55, E_max to 22,000. Beyond, the data says nothing about them."""


@dataclass(frozen=True)
class RoutedLaw:
    """Coefficients of the routed law; the first six are those of Clark et al. 2022, table 3."""

    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float
    rmse: float
    """Of the loss, in nats, over the fitted runs."""
    runs: int

    def loss(self, size: np.ndarray | float, experts: np.ndarray | float) -> np.ndarray:
        """Predicted loss in nats; sizes and experts broadcast. One expert stands for the law's own dense model."""
        log_size, log_experts = np.log10(size), _log_saturated(np.asarray(experts, float), self.e_start, self.e_max)
        return 10 ** (self.a * log_size + self.b * log_experts + self.c * log_size * log_experts + self.d)

    @property
    def cutoff(self) -> float:
        """Active parameters from which routing stops helping, 10^(-b/c)."""
        return 10 ** min(-self.b / self.c, 300.0) if self.c else math.inf


@dataclass(frozen=True)
class PowerLaw:
    """Dense loss L = 10^d · N^-alpha at fixed tokens."""

    alpha: float
    d: float
    rmse: float
    runs: int

    def loss(self, size: np.ndarray | float) -> np.ndarray:
        """Predicted loss in nats."""
        return 10 ** (self.d - self.alpha * np.log10(size))


def final_losses(curves: Sequence[Curve], router: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(active parameters, experts, last finite loss) of a router's runs, [runs] each; router names ignore case."""
    chosen = [c for c in curves if c.router.lower() == router.lower() and c.step_S.size]
    return (
        np.array([c.size for c in chosen]),
        np.array([c.experts for c in chosen], float),
        np.array([c.loss_S[-1] for c in chosen]),
    )


def fit_routed_law(size_R: np.ndarray, experts_R: np.ndarray, loss_R: np.ndarray) -> RoutedLaw:
    """Least squares on log10 loss over all six constants; dense runs (one expert) may be among the runs or not.

    The four linear constants are solved for inside the search over the two saturation constants (variable projection,
    Golub and Pereyra 1973). Raises DataError for fewer than 7 runs, 2 sizes or 3 numbers of experts.
    """
    sizes, counts = np.unique(size_R).size, np.unique(experts_R).size
    if loss_R.size < 7 or sizes < 2 or counts < 3:
        raise DataError(
            f"the law's 6 constants need 7 runs, 2 sizes and 3 numbers of experts, found {loss_R.size}, {sizes} and "
            f"{counts}: add runs to the ladder."
        )
    log_size_R, target_R = np.log10(size_R), np.log10(loss_R)

    def design(point: np.ndarray) -> np.ndarray:
        e_start = math.exp(point[0])
        log_experts_R = _log_saturated(experts_R, e_start, e_start + math.exp(point[1]))
        return np.stack([log_size_R, log_experts_R, log_size_R * log_experts_R, np.ones_like(log_size_R)], 1)

    def residual(point: np.ndarray) -> np.ndarray:
        design_RC = design(point)
        return design_RC @ np.linalg.lstsq(design_RC, target_R)[0] - target_R

    tries = [least_squares(residual, start, bounds=BOUNDS, xtol=1e-14, ftol=1e-14, gtol=1e-14) for start in STARTS]
    best = min(tries, key=lambda result: result.cost)
    a, b, c, d = np.linalg.lstsq(design(best.x), target_R)[0].tolist()
    e_start = math.exp(best.x[0])
    error_R = 10 ** (target_R + best.fun) - loss_R
    rmse = float(np.sqrt(np.mean(error_R**2)))
    return RoutedLaw(a, b, c, d, e_start, e_start + math.exp(best.x[1]), rmse, loss_R.size)


def fit_power_law(size_R: np.ndarray, loss_R: np.ndarray) -> PowerLaw:
    """Least squares of log10 loss on log10 size. Raises DataError for fewer than two sizes."""
    if np.unique(size_R).size < 2:
        raise DataError(f"an exponent needs dense runs of at least 2 sizes, found {np.unique(size_R).size}.")
    design_RC = np.stack([-np.log10(size_R), np.ones_like(size_R)], 1)
    alpha, d = np.linalg.lstsq(design_RC, np.log10(loss_R))[0].tolist()
    error_R = 10 ** (design_RC @ np.array([alpha, d])) - loss_R
    return PowerLaw(alpha, d, float(np.sqrt(np.mean(error_R**2))), loss_R.size)


def linear_gain(size_R: np.ndarray, gain_R: np.ndarray, target: float) -> float:
    """Gain at the target size from a line in log size; NaN with fewer than two sizes."""
    if np.unique(size_R).size < 2:
        return math.nan
    slope, level = np.polyfit(np.log(size_R / target), gain_R, 1)
    assert math.isfinite(slope)
    return float(level)


def _log_saturated(experts: np.ndarray, e_start: float, e_max: float) -> np.ndarray:
    """log10 Ê of the number of experts."""
    return -np.log10(1 / (experts - 1 + 1 / (1 / e_start - 1 / e_max)) + 1 / e_max)
