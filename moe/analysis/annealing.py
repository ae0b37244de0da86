"""A loss curve as a function of its learning rates, so that runs of one schedule say something about another.

    L(t) = floor + scale · S1(t)^-power - anneal · S2(t)

(Tissue, Wang and Wang 2024, arXiv 2408.11029): S1 is the area under the learning rate so far, S2 the area of its fall,
which the loss follows with a delay of `memory`. Here rates are shares of their peak and time is a share of the training, so
that S1 of a constant rate ends at 1 and S2 of a fall to zero ends at 1 when it is long past; the warm-up's rise is no annealing.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar, nnls
from scipy.signal import lfilter

from moe.config.rates import learning_rate
from moe.config.schema import Cosine, Schedule, Wsd
from moe.errors import DataError

MEMORIES = (0.003, 0.01, 0.03, 0.1)
"""Candidates of the delay, as shares of training."""
POWERS = (0.02, 4.0)
LEAST_POINTS = 6
"""Four constants and two to spare."""


@dataclass(frozen=True)
class Law:
    """The constants of one curve, in nats."""

    floor: float
    scale: float
    power: float
    anneal: float
    memory: float
    error: float
    """Root mean square deviation of the curve from the law."""

    def at(self, areas_2S: np.ndarray) -> np.ndarray:
        """Loss [S] at the areas (S1, S2)."""
        return self.floor + self.scale * areas_2S[0] ** -self.power - self.anneal * areas_2S[1]


def read_schedule(text: str, where: str) -> Schedule:
    """A schedule from its words, e.g. `wsd warmup_steps=100 decay_steps=400 final_fraction=0`. Raises DataError."""
    name, *parts = text.split() or [""]
    kind = {"cosine": Cosine, "wsd": Wsd}.get(name)
    found = dict(re.findall(r"(\w+)=([0-9.eE+-]+)", " ".join(parts)))
    if kind is None or len(found) != len(parts) or not found.keys() <= {field.name for field in fields(kind)}:
        raise DataError(
            f"{where}: schedule must be `cosine` or `wsd` and its settings, found {text!r}: e.g. `cosine warmup_steps=100 "
            "final_fraction=0.1` or `wsd warmup_steps=100 decay_steps=400 final_fraction=0`."
        )
    try:
        values = {key: float(value) if key == "final_fraction" else int(value) for key, value in found.items()}
        return kind(**values)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: schedule {text!r} is not complete: {error}.") from error


def write_schedule(schedule: Schedule) -> str:
    """The words that `read_schedule` reads."""
    settings = [f"{field.name}={getattr(schedule, field.name):g}" for field in fields(schedule) if field.name != "name"]
    return " ".join([schedule.name, *settings])


def relative_rates(schedule: Schedule, steps: int) -> np.ndarray:
    """The learning rate [steps] of every step over the peak."""
    return np.array([learning_rate(schedule, 1.0, step, steps) for step in range(steps)])


def areas(rate_T: np.ndarray, memory: float) -> np.ndarray:
    """(S1, S2) [2, T] after every step, from rates over the peak; `memory` is a share of the T steps."""
    T, peak = len(rate_T), int(np.argmax(rate_T))
    fall_T = -np.diff(rate_T, prepend=rate_T[0])
    fall_T[: peak + 1] = 0  # a rise before the peak is warm-up
    stay = np.exp(-1 / max(memory * T, 1e-9))
    momentum_T = lfilter([1.0], [1.0, -stay], fall_T)
    return np.stack([np.cumsum(rate_T), (1 - stay) * np.cumsum(momentum_T)]) / np.array([[T], [1.0]])


def fit_law(areas_2S: np.ndarray, loss_S: np.ndarray, memory: float) -> Law:
    """Least squares of one curve with a given memory: the power is searched, the rest is linear and not negative.

    Raises DataError for fewer than LEAST_POINTS points.
    """
    if loss_S.size < LEAST_POINTS:
        raise DataError(
            f"a law with an annealing term needs {LEAST_POINTS} evaluations after the warm-up, found {loss_S.size}."
        )

    def solve(log_power: float) -> tuple[np.ndarray, float]:
        columns = (np.ones_like(loss_S), areas_2S[0] ** -np.exp(log_power), -areas_2S[1])
        return nnls(np.stack(columns, 1), loss_S)

    grid = np.linspace(math.log(POWERS[0]), math.log(POWERS[1]), 24)
    best = grid[int(np.argmin([solve(p)[1] for p in grid]))]
    width = grid[1] - grid[0]
    found: Any = minimize_scalar(
        lambda p: solve(p)[1], bounds=(best - width, best + width), method="bounded", options={"xatol": 1e-7}
    )
    (floor, scale, anneal), norm = solve(float(found.x))
    error = float(norm) / loss_S.size**0.5
    return Law(float(floor), float(scale), math.exp(found.x), float(anneal), memory, error)


def fit_laws(curves: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[Law]:
    """Laws of curves (rates over the peak [T], steps [S], losses [S]) with the one memory that fits all of them best.

    Steps count from 1; those of the warm-up should have been left out.
    """
    fits = []
    for memory in MEMORIES:
        laws = [
            fit_law(areas(rate_T, memory)[:, step_S.astype(int) - 1], loss_S, memory)
            for rate_T, step_S, loss_S in curves
        ]
        fits.append((sum(law.error**2 for law in laws), laws))
    return min(fits, key=lambda fit: fit[0])[1]
