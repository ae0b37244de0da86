"""Shares of successes with their uncertainty."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from moe.errors import UserError


@dataclass(frozen=True)
class Share:
    """Successes of a number of trials, with the Wilson score interval of the probability behind them."""

    successes: int
    trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Successes over trials."""
        return self.successes / self.trials

    def above(self, other: "Share") -> bool:
        """Whether this whole interval lies above the other one."""
        return self.low > other.high

    def __str__(self) -> str:
        return f"{self.successes}/{self.trials} [{self.low:.2f}, {self.high:.2f}]"


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Share:
    """The share with Wilson's interval (1927, JASA 22): (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    if not 0 <= successes <= trials or trials == 0:
        raise UserError(f"a share needs trials, and as many successes at most: found {successes} of {trials}.")
    z, p = NormalDist().inv_cdf(0.5 + confidence / 2), successes / trials
    middle = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == trials else (middle + half) / scale
    return Share(successes, trials, low, high)
