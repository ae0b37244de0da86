"""What a run writes: append-only JSON lines, and the figures of routing health with their noise floors."""

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


def load_cv_floor(num_experts: int, rows: float) -> float:
    """Expected coefficient of variation of the loads of a perfect router whose rows fall independently: √((E-1)/rows)."""
    return math.sqrt((num_experts - 1) / rows) if rows > 0 else 0.0


def dead_experts_floor(num_experts: int, rows: float) -> float:
    """Expected number of experts that a perfect router leaves below DEAD_SHARE in one step by chance (binomial loads)."""
    n, p = round(rows), 1 / num_experts
    if n == 0 or num_experts == 1:
        return 0.0
    most = math.ceil(DEAD_SHARE * n * p) - 1  # a load counts as dead if it is strictly below the share
    log_ways = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(most + 1))
    terms = (math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p)) for k, ways in enumerate(log_ways))
    return num_experts * sum(terms)


def routing_row(statistics: dict[str, np.ndarray]) -> dict[str, Any]:
    """The logged fields of one layer and step from its statistics summed over micro-batches and ranks.

    statistics: counts_E and kept_E (rows chosen and rows left after drops), share_sum_E, entropy_sum, margin_sum,
    token_sum, logit_square_sum, lse_square_sum, logit_max (moe/balance.py); with expert parallelism sent_bytes and
    undelivered_rows (moe/parallel/exchange.py). A router with experts that cost nothing (zero, copy, constant) has A > E
    scores: entropies are over all of them, balance over the E that compute.
    """
    counts_E = statistics["counts_E"].astype(float)
    rows, E = counts_E.sum(), len(counts_E)
    share_E = counts_E / max(rows, 1)
    entropy = entropy_of(share_E)
    tokens = max(float(statistics["token_sum"]), 1.0)
    log_E = math.log(E) if E > 1 else 1.0
    score_A = statistics["share_sum_E"].astype(float) / tokens
    log_A = math.log(len(score_A)) if len(score_A) > 1 else 1.0
    score_E = score_A[:E] * (score_A.sum() / max(score_A[:E].sum(), 1e-30))
    token_entropy = float(statistics["entropy_sum"]) / tokens
    fields = {
        "counts": [int(count) for count in counts_E],
        "tokens": int(statistics["token_sum"]),
        "tokens_per_expert": float(rows / E),
        "load_entropy": entropy / log_E,
        "effective_experts": math.exp(entropy),
        "load_cv": float(share_E.std() * E) if rows else 0.0,
        "load_cv_floor": load_cv_floor(E, rows),
        "max_vio": float(share_E.max() * E - 1) if rows else 0.0,
        "max_vio_floor": max_vio_floor(E, rows),
        "dead_experts": int((share_E * E < DEAD_SHARE).sum()),
        "dead_experts_floor": dead_experts_floor(E, rows),
        "drop_rate": float(1 - statistics["kept_E"].sum() / max(rows, 1)) if rows else 0.0,
        "router_entropy": token_entropy / log_A,
        "routing_information": max(0.0, entropy_of(score_A) - token_entropy) / log_A,
        "balance_value": float(E * (share_E * score_E).sum()),
        "logit_max": float(statistics["logit_max"]),
        "logit_rms": math.sqrt(float(statistics["logit_square_sum"]) / tokens),
        "logsumexp_square": float(statistics["lse_square_sum"]) / tokens,
        "margin": float(statistics["margin_sum"]) / tokens,
    }
    if "sent_bytes" in statistics:
        fields["sent_bytes"] = int(statistics["sent_bytes"])
        fields["undelivered"] = float(statistics["undelivered_rows"]) / max(rows, 1)
    return fields


def router_weight_row(weight_ED: np.ndarray, before_ED: np.ndarray) -> dict[str, float]:
    """The logged fields of one layer's router matrix: how alike its rows are, and how far it moved in this step.

    Mean cosine of two rows (E‖mean_i w_i/‖w_i‖‖² - 1)/(E - 1), whose floor is the deviation of that mean for random rows,
    √(2/(E(E-1)D)); conditioning max_i ‖w_i - w̄‖/‖w̄‖ (arXiv 2606.28116, eq. 7 and 8).
    """
    w_ED = weight_ED.astype(float)
    E, D = w_ED.shape
    mean_D = w_ED.mean(0)
    unit_ED = w_ED / np.maximum(np.linalg.norm(w_ED, axis=1, keepdims=True), 1e-30)
    cosine = (E * float(np.square(unit_ED.mean(0)).sum()) - 1) / (E - 1) if E > 1 else 1.0
    moved = float(np.linalg.norm(w_ED - before_ED) / max(float(np.linalg.norm(before_ED)), 1e-30))
    return {
        "row_cosine": cosine,
        "row_cosine_floor": math.sqrt(2 / (E * (E - 1) * D)) if E > 1 else 0.0,
        "conditioning": float(np.linalg.norm(w_ED - mean_D, axis=1).max() / max(float(np.linalg.norm(mean_D)), 1e-30)),
        "router_rms": float(np.sqrt(np.square(w_ED).mean())),
        "router_change": moved,
    }


def entropy_of(share: np.ndarray) -> float:
    """Entropy in nats of shares that sum to 1."""
    used = share[share > 0]
    return float(-(used * np.log(used)).sum())


def mutual_information(table: np.ndarray) -> tuple[float, float]:
    """I(row; column) of a table of counts over H(column), and what independent counts would show by chance.

    The chance level is the plug-in estimate's first-order bias (R-1)(C-1)/(2n) (Miller and Madow 1955), R and C the rows
    and columns that occur; 0 for a table with one row or column.
    """
    n = float(table.sum())
    used = table[table.sum(1) > 0][:, table.sum(0) > 0].astype(float)
    if n == 0 or min(used.shape) < 2:
        return 0.0, 0.0
    joint = used / n
    column = entropy_of(joint.sum(0))
    information = entropy_of(joint.sum(1)) + column - entropy_of(joint.ravel())
    floor = (used.shape[0] - 1) * (used.shape[1] - 1) / (2 * n)
    return max(0.0, information) / column, min(1.0, floor / column)


def coactivation(pairs_EE: np.ndarray, counts_E: np.ndarray) -> tuple[float, float, tuple[int, int]]:
    """Largest P(j chosen | i chosen) over pairs of experts, what chance would show, and the pair (i, j).

    pairs_EE [i, j]: tokens that chose both. Chance: choices of k of E at random, whose largest of E(E-1) shares exceeds
    (k-1)/(E-1) by √(2 ln(E(E-1)))·√(p(1-p)/n) for n choices of an expert. Experts chosen fewer than 20 times are left out.
    """
    E = len(counts_E)
    share_EE = pairs_EE / np.maximum(counts_E, 1)[:, None]
    share_EE = np.where((counts_E >= 20)[:, None] & ~np.eye(E, dtype=bool), share_EE, -1.0)
    i, j = np.unravel_index(int(share_EE.argmax()), share_EE.shape)
    off_diagonal = pairs_EE.sum() - np.trace(pairs_EE)
    p = min(1.0, float(off_diagonal / max(counts_E.sum(), 1)) / max(E - 1, 1))
    n = max(float(counts_E.mean()), 1.0)
    floor = min(1.0, p + math.sqrt(2 * math.log(max(E * (E - 1), 2)) * p * (1 - p) / n))
    return max(0.0, float(share_EE[i, j])), floor, (int(i), int(j))


def overlap(now_TE: np.ndarray, before_TE: np.ndarray) -> float:
    """Share of the choices in two boolean tables [T, E] that are in both: 2|A∩B|/(|A|+|B|), for k of E |A∩B|/k."""
    total = int(now_TE.sum()) + int(before_TE.sum())
    return 2 * int((now_TE & before_TE).sum()) / total if total else 1.0
