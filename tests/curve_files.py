"""Files of loss curves with a known truth, in the format that `moe forecast` and `moe ladder` read."""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"15M": 1.5e7, "40M": 4e7, "100M": 1e8, "250M": 2.5e8, "600M": 6e8}
EXPERTS = (2, 4, 8, 16, 32, 64, 128)
ROUTERS = ("Hash", "S-Base")
STEPS = np.arange(0, 101, 4) * 1000
HEADER = (
    "hyper_id", "step", "loss_validation", "num_experts", "router_type", "dense_parameter_count", "model_size_label", "k",
    "routing_frequency", "flop_increase",
)  # fmt: skip


def dense_loss(size: float, progress_S: np.ndarray) -> np.ndarray:
    """A power of the size at the end of training, falling towards it."""
    return 10**1.08 * size**-0.08 * (1 + 0.3 * (1 - progress_S) ** 2)


def final_gain(size: float, experts: int) -> float:
    """Linear in log size for each number of experts."""
    return 0.06 * np.log(experts) * (1 - 0.1 * np.log(size / 1e8))


def gain(size: float, experts: int, progress_S: np.ndarray, shape: float = 0.0) -> np.ndarray:
    """The final gain times a power of progress that grows with size: log-linear in all that the forecast looks at."""
    power = 0.12 + 0.02 * np.log(size / 1e8) + shape
    return final_gain(size, experts) * np.maximum(progress_S, 1e-3) ** power


def rows(
    noise: float = 0.0,
    shape: float = 0.0,
    seed: int = 0,
    sizes: Sequence[str] = tuple(SIZES),
    kind: tuple[float, float] = (1, 0.5),
) -> list[dict[str, Any]]:
    """Dense and sparse runs of every size; `noise` is nats per evaluation, `shape` each run's deviation in the power.

    `kind` is the sparse runs' k and share of sparse layers.
    """
    random = np.random.default_rng(seed)
    progress_S = STEPS / STEPS[-1]
    found, run = [], 0
    for label in sizes:
        for router, experts in [("Dense", 1), *((r, e) for r in ROUTERS for e in EXPERTS)]:
            size = SIZES[label]
            gain_S = gain(size, experts, progress_S, shape * random.normal()) if experts > 1 else 0
            loss_S = dense_loss(size, progress_S) - gain_S + noise * random.normal(size=STEPS.size)
            run += 1
            for step, loss in zip(STEPS, loss_S, strict=True):
                values = (run, step, loss, experts, router, size, label, *kind, 1.0 if router == "Dense" else "")
                found.append(dict(zip(HEADER, values, strict=True)))
    return found


def write(path: Path, lines: Sequence[dict[str, Any]], header: Sequence[str] = HEADER) -> Path:
    """A CSV file of rows; gzip if the name says so."""
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    return path
