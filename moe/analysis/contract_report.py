"""The contracts of a comparison, from its files alone: who wins at equal what, by how much, how fast, and from when on.

Reads compare.json, the runs, their ledgers and the interleaved timings; `judge_comparison` gives `contracts` of report.json.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe import cost
from moe.analysis.contracts import (
    CONTRACTS,
    Arm,
    crossover,
    decompose,
    effective_size,
    judge,
    log_ratio,
    mean_curve,
    net_speed,
)
from moe.analysis.ledger import account
from moe.analysis.ledger_prices import curve, tokens_to
from moe.analysis.paired import t_interval
from moe.analysis.rows import RunRows, read_json, read_run
from moe.analysis.summaries import measured_flops
from moe.config.load import load
from moe.errors import UserError

Json = dict[str, Any]
Curve = tuple[np.ndarray, np.ndarray]
"""Tokens and loss of a run's evaluations."""
ROUTERLESS = ("hash", "frozen_random")
"""Arms whose router learns nothing."""


def judge_comparison(directory: Path, confidence: float = 0.95) -> Json:
    """Everything that can be said of a comparison's contracts; what needs an arm that was not trained is null or says so."""
    record = read_json(directory / "compare.json", {"arms": (dict,), "seeds": (list,)})
    names = {**record["arms"], **record.get("more_arms", {})}
    runs = {arm: [read_run(directory / name) for name in folders] for arm, folders in names.items()}
    rows = record.get("twin", {}).get("rows_per_token")
    seconds = timed_seconds(directory)
    arms = {arm: _arm(arm, found, rows if arm != "dense" else None, seconds.get(arm)) for arm, found in runs.items()}
    sparse, active, total = arms["sparse"], arms["dense"], arms.get("total")
    curves = {arm: [curve(run.path) for run in found] for arm, found in runs.items()}
    return {
        "schema_version": 1,
        "unit": "bits per byte",
        "confidence": confidence,
        "seeds": record["seeds"],
        "learning_rate": record.get("learning_rate"),
        "contracts": _judged(sparse, active, total, confidence),
        "effective_size": None if total is None else effective_size(sparse, active, total, confidence),
        "speed": _speed(arms, curves, _timing(directory, "dense"), confidence),
        "crossover": _crossover(curves, seconds),
        "decomposition": [decompose(sparse, active, arms[arm], confidence) for arm in ROUTERLESS if arm in arms],
        "arms": {name: {"loss": arm.loss_S.tolist(), **arm.resources} for name, arm in arms.items()},
    }


def _judged(sparse: Arm, active: Arm, total: Arm | None, confidence: float) -> list[Json]:
    """Every contract. Without any price, equal cost is equal wall-clock: rent goes by the hour."""
    entries = {contract: judge(contract, sparse, active, total, confidence) for contract in CONTRACTS}
    clock = entries["seconds"]
    unpriced = not any("dollars" in arm.resources for arm in (sparse, active, total) if arm is not None)
    if unpriced and clock["verdict"] is not None:
        source = f"{clock['from']}, at equal wall-clock, which any rent by the hour makes the same (no price was given)"
        known = {"sparse": None, "active": None, "total": None, "from": source}
        entries["dollars"] = {**clock, "contract": "dollars", "name": CONTRACTS["dollars"], **known}
    return list(entries.values())


def _timing(directory: Path, arm: str) -> Json | None:
    """The interleaved timing of the sparse arm against a dense one; its slot `sparse` holds the first of the two."""
    path = directory / ("timing.json" if arm == "dense" else f"timing_{arm}.json")
    return read_json(path, {"sparse": (list,), "dense": (list,)}) if path.exists() else None


def timed_seconds(directory: Path) -> dict[str, float]:
    """Seconds per token of each timed arm; the total twin was timed against the active one, whose own timing scales it."""
    first, second = _timing(directory, "dense"), _timing(directory, "total")
    if first is None:
        return {}
    found = {arm: 1 / float(np.median(first[arm])) for arm in ("sparse", "dense")}
    if second is not None:
        ratios = np.asarray(second["dense"], float) / np.asarray(second["sparse"], float)
        found["total"] = found["dense"] * float(np.median(ratios))
    return found


def _arm(name: str, runs: Sequence[RunRows], rows_per_token: float | None, seconds: float | None) -> Arm:
    """Losses and resources of an arm. Memory is the plan's: in a small run on a CPU the process is mostly Python."""
    tokens = float(np.mean([run.summary["tokens"] for run in runs]))
    flops = np.mean([measured_flops(run, rows_per_token) * run.summary["tokens"] for run in runs])
    resources = {
        "active_parameters": float(runs[0].summary["parameters_active"]),
        "total_parameters": float(runs[0].summary["parameters_total"]),
        "flops": float(flops),
        "memory": _memory(runs),
    }
    if seconds is not None:
        resources["seconds"] = seconds * tokens
    if all((run.path / "ledger.jsonl").exists() for run in runs):
        accounts = [account(run.path) for run in runs]
        for amount in ("joules", "dollars"):
            values = [
                one[amount]["value"] * run.summary["tokens"] / one["tokens"]
                for one, run in zip(accounts, runs, strict=True)
                if one[amount]
            ]
            if len(values) == len(runs) and min(values) > 0:
                resources[amount] = float(np.mean(values))
        if seconds is not None:
            # rent and modelled watts go by time, which the interleaved timing knows better than runs that shared a machine
            own = np.mean(
                [
                    one["seconds"]["value"] * run.summary["tokens"] / one["tokens"]
                    for one, run in zip(accounts, runs, strict=True)
                ]
            )
            counters = all(one["joules"] and one["joules"]["grade"] == "measured" for one in accounts)
            for amount in ("dollars",) if counters else ("dollars", "joules"):
                if amount in resources:
                    resources[amount] *= seconds * tokens / float(own)
    return Arm(name, np.array([run.final_bits for run in runs]), resources)


def _memory(runs: Sequence[RunRows]) -> float:
    if "cuda" in str(runs[0].meta.get("device", "")).lower() or "nvidia" in str(runs[0].meta.get("device", "")).lower():
        return float(max(run.summary["peak_memory_bytes"] for run in runs))
    return float(sum(cost.memory_bytes(load(runs[0].config)).values()))


def _speed(arms: dict[str, Arm], curves: dict[str, list[Curve]], timing: Json | None, confidence: float) -> Json:
    """Compute multiplier at equal loss, step-time tax, and their quotient."""
    flops = arms["dense"].resources["flops"] / arms["sparse"].resources["flops"]
    logs = []
    try:
        for sparse, dense in zip(curves["sparse"], curves["dense"], strict=True):
            needed, _ = tokens_to(*dense, float(sparse[1][-1]))
            if needed is None:
                return {"why": "a dense curve no longer falls, so no amount of compute takes it to the sparse loss"}
            logs.append(math.log(needed / sparse[0][-1] * flops))
    except (UserError, IndexError) as error:
        return {"why": f"no multiplier: {error}"}
    multiplier = t_interval(logs, confidence)
    if timing is None:
        return {"why": "no step-time tax: the arms were not timed"}
    return net_speed(multiplier, log_ratio(timing["dense"], timing["sparse"], confidence))


def _crossover(curves: dict[str, list[Curve]], seconds: dict[str, float]) -> Json:
    """Where the mean sparse curve gets ahead of the mean dense one, in tokens, and in hours where both were timed."""
    try:
        sparse, dense = mean_curve(curves["sparse"]), mean_curve(curves["dense"])
        found: Json = {"tokens": crossover(sparse, dense), "hours": None}
        if {"sparse", "dense"} <= set(seconds):
            hours = {
                arm: (line[0] * seconds[arm] / 3600, line[1]) for arm, line in (("sparse", sparse), ("dense", dense))
            }
            found["hours"] = crossover(hours["sparse"], hours["dense"])
    except (UserError, IndexError) as error:
        return {"tokens": None, "hours": None, "why": str(error)}
    return found


# -------------------------------------------------------------------------------------------------------------- words


def describe(result: Json) -> str:
    """The contracts in words, a line each."""
    return "\n".join([*(line["sentence"] for line in contract_lines(result)), *other_lines(result)])


def contract_lines(result: Json) -> list[Json]:
    """Of each contract {contract, verdict, sentence}."""
    return [
        {"contract": entry["contract"], "verdict": entry["verdict"], "sentence": _contract_line(entry, result)}
        for entry in result["contracts"]
    ]


def other_lines(result: Json) -> list[str]:
    """Effective size, speed, crossover and decomposition, a sentence each."""
    lines = []
    size = result["effective_size"]
    if size is not None:
        if size["parameters"] is None:
            lines.append(f"Effective dense size: {size['why']}.")
        else:
            lines.append(
                f"Effective dense size: {size['parameters']:,.0f} parameters{_ends(size, ',.0f')}, {size['over_active']:.2f} times "
                f"the active twin's and {size['over_total']:.2f} times the total."
            )
    lines += [_speed_line(result["speed"]), *_crossover_lines(result["crossover"])]
    for part in result["decomposition"]:
        share = "" if part["share"] is None else f": {part['share']:.0%} of the gain is capacity"
        lines.append(
            f"Against the {part['twin']} twin: capacity {part['capacity']['mean']:+.4f}{_ends(part['capacity'], '+.4f')}, "
            f"routing {part['routing']['mean']:+.4f}{_ends(part['routing'], '+.4f')} bits per byte{share}."
        )
    return lines


def _contract_line(entry: Json, result: Json) -> str:
    start = f"At {entry['name']}: "
    if entry["verdict"] is None:
        return f"{start}not judged ({entry['why']})."
    gain = entry["gain"]
    seeds = f"{len(gain['values'])} paired seed{'s' * (len(gain['values']) > 1)}"
    return (
        f"{start}{entry['verdict']}, {gain['mean']:+.4f}{_ends(gain, '+.4f')} {result['unit']} over {seeds}; dense loss from "
        f"{entry['from']}."
    )


def _ends(entry: Json, form: str) -> str:
    return "" if entry["low"] is None else f" [{entry['low']:{form}}, {entry['high']:{form}}]"


def _speed_line(speed: Json) -> str:
    if "multiplier" not in speed:
        return f"Net speed: {speed['why']}."
    multiplier, tax = speed["multiplier"], speed["tax"]
    start = (
        f"Compute multiplier at equal loss {multiplier['mean']:.2f}{_ends(multiplier, '.2f')}, step-time tax "
        f"{tax['mean']:.2f}{_ends(tax, '.2f')}"
    )
    if speed["net"] is None:
        interval = "" if speed["low"] is None else f": the interval{_ends(speed, '.2f')} contains 1"
        return f"{start}; net speed undecided{interval}."
    return f"{start}; net speed {speed['net']:.2f}{_ends(speed, '.2f')}."


def _crossover_lines(found: Json) -> list[str]:
    words = {"ahead": "is ahead from the first evaluation on", "behind": "is not ahead at the end"}
    lines = []
    for unit, form in (("tokens", ",.0f"), ("hours", ".3g")):
        entry = found[unit]
        if entry is not None:
            where = (
                f"gets ahead for good at {entry['at']:{form}}" if entry["state"] == "crosses" else words[entry["state"]]
            )
            lines.append(f"At equal {unit} the sparse model {where}.")
    return lines or [f"No crossover: {found.get('why', 'the arms were not timed')}."]
