"""What a run writes: append-only JSON lines, and the routing row of a layer."""

import errno
import json
import math
import os
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from moe.files import finite

SCHEMA_VERSION = 1
DEAD_SHARE = 0.01
"""An expert with less than this share of the balanced load in a step counts as dead in it."""


class JsonLines:
    """A file of JSON lines that are only appended, each with schema_version and attempt; a line is written whole or not at all.

    On opening, what a killed process left of an unfinished last line is cut off.
    """

    def __init__(self, path: Path, attempt: int):
        self.path, self.attempt = path, attempt
        path.touch()
        _cut_partial_line(path)
        self.file = path.open("ab", buffering=0)

    def write(self, **fields: Any) -> None:
        """Append one line. Non-finite numbers become null, so that every line is JSON."""
        row = {"schema_version": SCHEMA_VERSION, "attempt": self.attempt, **fields}
        line = (json.dumps(finite(row), allow_nan=False) + "\n").encode()
        before = self.file.tell()
        written = self.file.write(line)
        if written != len(line):
            # the disk took only a part: leave whole lines behind, and say so
            self.file.truncate(before)
            raise OSError(errno.ENOSPC, "a log line could be written only in part", str(self.path))

    def close(self) -> None:
        """Write through to the disk and close."""
        os.fsync(self.file.fileno())
        self.file.close()


def _cut_partial_line(path: Path) -> None:
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        keep = size
        while keep > 0:
            start = max(0, keep - 65536)
            file.seek(start)
            chunk = file.read(keep - start)
            newline = chunk.rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < size:
            file.truncate(keep)


def max_vio_floor(num_experts: int, rows: float) -> float:
    """Expected MaxVio of a perfect router whose `rows` fall on experts independently: the noise floor of MaxVio.

    Loads that sum to a constant are E independent Poisson loads minus their mean, so the largest exceeds the mean by
    z·r + (z² - 1)/6·r² of it: r = sqrt(E/rows) is a load's relative deviation and its skewness, z = Φ⁻¹((E - 3/8)/(E + 1/4))
    Blom's normal order statistic, and the second term the Cornish-Fisher correction.
    """
    if num_experts < 2 or rows <= 0:
        return 0.0
    z = NormalDist().inv_cdf((num_experts - 0.375) / (num_experts + 0.25))
    r = math.sqrt(num_experts / rows)
    return z * r + (z * z - 1) / 6 * r * r


def routing_row(statistics: dict[str, np.ndarray]) -> dict[str, Any]:
    """The logged fields of one layer and step from its statistics summed over micro-batches and ranks.

    statistics: counts_E and kept_E (rows chosen and rows left after drops), entropy_sum, margin_sum, token_sum, logit_max.
    """
    counts_E = statistics["counts_E"].astype(float)
    rows, E = counts_E.sum(), len(counts_E)
    share_E = counts_E / max(rows, 1)
    entropy = float(-(share_E[share_E > 0] * np.log(share_E[share_E > 0])).sum())
    tokens = max(float(statistics["token_sum"]), 1.0)
    log_E = math.log(E) if E > 1 else 1.0
    return {
        "counts": [int(count) for count in counts_E],
        "load_entropy": entropy / log_E,
        "effective_experts": math.exp(entropy),
        "max_vio": float(share_E.max() * E - 1) if rows else 0.0,
        "max_vio_floor": max_vio_floor(E, rows),
        "dead_experts": int((share_E * E < DEAD_SHARE).sum()),
        "drop_rate": float(1 - statistics["kept_E"].sum() / max(rows, 1)) if rows else 0.0,
        "router_entropy": float(statistics["entropy_sum"]) / tokens / log_E,
        "logit_max": float(statistics["logit_max"]),
        "margin": float(statistics["margin_sum"]) / tokens,
    }
