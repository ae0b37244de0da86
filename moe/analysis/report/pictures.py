"""PNG plots of a report, for papers and slides: the page draws its own."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe.analysis import plots
from moe.analysis.report.budgets import seconds_per_token
from moe.analysis.report.reading import Arm
from moe.analysis.rows import RunRows


def curve_of(run: RunRows, per_token: float) -> plots.Curve:
    """Validation curve of a run against tokens · per_token."""
    tokens = {row["step"]: row["tokens"] for row in run.metrics}
    during = [row for row in run.evals if not row["final"] and row["step"] in tokens]
    end = tokens.get(run.final["step"], run.summary["tokens"]) if run.evals else run.summary["tokens"]
    return plots.Curve(
        np.array([tokens[row["step"]] * per_token for row in during], dtype=float),
        np.array([row["bits_per_byte"] for row in during], dtype=float),
        end * per_token,
        run.final_bits,
    )


def loss_pictures(arms: Sequence[Arm], directory: Path) -> None:
    """Validation loss against tokens, FLOPs and seconds."""
    total = max(
        (x for arm in arms for run in arm.runs if (x := arm.flops_per_token * run.summary["tokens"]) == x), default=0
    )
    exponent = 3 * int(math.log10(max(total, 1)) // 3)
    power = f"$10^{{{exponent}}}$ " if exponent else ""
    axes = [
        ("tokens", "Training tokens (millions)", lambda arm, run: 1e-6),
        ("flops", f"Training compute ({power}FLOPs)", lambda arm, run: arm.flops_per_token / 10**exponent),
        ("seconds", "Training time (seconds)", lambda arm, run: seconds_per_token(run, arm.tokens_per_second)),
    ]
    for label, xlabel, scale in axes:
        curves = {arm.name: [curve_of(run, scale(arm, run)) for run in arm.runs] for arm in arms}
        plots.plot_curves(curves, xlabel, directory / "plots" / f"loss_{label}.png")


def routing_pictures(runs: Sequence[RunRows], directory: Path) -> None:
    """Load of every expert over time, and balance over time."""
    if runs and runs[0].routing:
        plots.plot_routing(runs, directory / "plots" / "routing_load.png")
        plots.plot_balance(runs, directory / "plots" / "routing_balance.png")
