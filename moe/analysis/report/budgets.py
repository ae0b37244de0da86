"""What runs took of each budget: tokens, FLOPs, time, energy, money, and in which unit the page shows it.

A run's use of a budget grows in proportion to its tokens, at the mean rate of the whole run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe.analysis.report.reading import Arm, ledger_of
from moe.analysis.rows import Json, RunRows

UNITS: dict[str, tuple[tuple[str, float], ...]] = {
    "tokens": (("tokens", 1.0),),
    "flops": (("FLOPs", 1.0),),
    "time": (("hours", 1.0), ("minutes", 1 / 60), ("seconds", 1 / 3600)),
    "energy": (("kWh", 1.0), ("Wh", 1e-3), ("mWh", 1e-6)),
    "money": (("US dollars", 1.0), ("US cents", 1e-2), ("thousandths of a US cent", 1e-5)),
}
"""Units of each budget with their size in its first; the largest that the longest run has at least two of is used."""
WHY = {
    "tokens": "no run has done a step",
    "flops": "no run's settings can be read",
    "time": "no run has done a step",
    "energy": "no run's ledger knows it",
    "money": "no run's ledger knows it: set cost.price_per_hour or cost.price_per_kwh",
}
TITLES = {
    "tokens": "Training tokens",
    "flops": "Training compute (FLOPs)",
    "time": "Training time",
    "energy": "Energy",
    "money": "Money",
}


@dataclass(frozen=True)
class Budgets:
    """The budgets of the arms on one page."""

    axes: list[Json]
    """Name, label, unit, note, and why it is missing (or None), of each."""
    per_token: dict[str, dict[str, list[float]]]
    """By budget and arm, what a token of each run takes, in the axis's unit; arms of which it is not known are absent."""

    def of(self, arm: str) -> dict[str, list[float]]:
        """What a token of each run of an arm takes, by budget."""
        return {name: arms[arm] for name, arms in self.per_token.items() if arm in arms}


def seconds_per_token(run: RunRows, speed: float | None) -> float:
    """Seconds per token: of the interleaved timing if there is one, else of the run's own steps; NaN if there are none."""
    if speed:
        return 1 / speed
    tokens = run.metrics[-1]["tokens"] if run.metrics else 0
    return sum(row["step_seconds"] for row in run.metrics) / tokens if tokens else math.nan


def rates(arm: Arm, timed: bool) -> tuple[list[dict[str, float]], dict[str, Json | None]]:
    """Per run, what a token takes of each budget (NaN: not known); and how well energy and money are known."""
    found, known = [], {}
    for run in arm.runs:
        spent = ledger_of(run)
        seconds = math.nan if timed and not arm.tokens_per_second else seconds_per_token(run, arm.tokens_per_second)
        rate = {"tokens": 1.0, "flops": arm.flops_per_token, "time": seconds / 3600}
        for name, amount in (("energy", "kwh"), ("money", "dollars")):
            entry = spent[amount] if spent else None
            known[name] = entry
            rate[name] = entry["value"] / spent["tokens"] if spent and entry and spent["tokens"] else math.nan
        if spent and timed and spent["seconds"]["value"] > 0:
            # rent goes by time, and the interleaved timing knows that better than runs that shared a machine
            rate["money"] *= seconds * spent["tokens"] / spent["seconds"]["value"]
        found.append(rate)
    return found, known


def budgets_of(arms: Sequence[Arm], jobs: int = 1) -> Budgets:
    """What the arms took; `jobs` runs shared the machine. Where some arms were timed, the others' time and rent are not known."""
    timed = any(arm.tokens_per_second for arm in arms)
    by_arm = {arm.name: rates(arm, timed) for arm in arms}
    notes = {
        "tokens": "Counted.",
        "flops": "Forward and backward, by formula, with the expert rows that were really routed.",
    }
    notes |= {"time": _time_note(timed, jobs)}
    notes |= {name: _ledger_note([known[name] for _, known in by_arm.values()]) for name in ("energy", "money")}
    axes, scaled = [], {}
    for name, units in UNITS.items():
        known = {arm.name: arm for arm in arms if all(_positive(rate[name]) for rate in by_arm[arm.name][0])}
        ends = [
            rate[name] * run.summary["tokens"]
            for arm in known.values()
            for rate, run in zip(by_arm[arm.name][0], arm.runs, strict=True)
        ]
        unit, size = next((u for u in units if max(ends, default=math.inf) >= 2 * u[1]), units[-1])
        without = [arm.name for arm in arms if arm.name not in known]
        note = notes[name] + (f" Not known of {', '.join(without)}." if without and known else "")
        label = TITLES[name] if name in ("tokens", "flops") else f"{TITLES[name]} ({unit})"
        missing = None if known else WHY[name]
        axes.append({"name": name, "label": label, "unit": unit, "note": note, "missing": missing})
        scaled[name] = {arm: [rate[name] / size for rate in by_arm[arm][0]] for arm in known}
    return Budgets(axes, scaled)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _time_note(timed: bool, jobs: int) -> str:
    if timed:
        return "Tokens divided by the median speed of the separate interleaved timing."
    if jobs > 1:
        return f"The runs' own step times; {jobs} runs shared the machine, so they do not compare the arms' speed."
    return "The runs' own step times, each at its mean."


def _ledger_note(entries: Sequence[Json | None]) -> str:
    known = [entry for entry in entries if entry is not None]
    grades, said = (
        sorted({entry["grade"] for entry in known}),
        "; ".join(dict.fromkeys(entry["source"] for entry in known)),
    )
    return f"The ledger's, spread evenly over a run's tokens, evaluations and lost work included ({', '.join(grades)}: {said})."
