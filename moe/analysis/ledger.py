"""What runs have used and what that costs, summed from their ledger files: every attempt, every rank, each line once.

A line says what came since the line before it, so a sum is all there is to do. Energy and time are charged at the rates of
the attempt that used them, unless others are given.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.analysis.rows import NUMBER, Json, all_lines, read_json
from moe.config.schema import Cost
from moe.cost.charges import Charge, Grade, Graded, Rates, charge, rates_from_json, rates_of, worst
from moe.errors import UserError

AMOUNTS = ("seconds", "device_hours", "flops", "kwh", "gco2e", "dollars")
"""What is summed over runs, in the order in which it is shown; joules are kwh without PUE."""
UNITS = {
    "seconds": "s",
    "device_hours": "h",
    "flops": "FLOPs",
    "joules": "J",
    "kwh": "kWh",
    "gco2e": "gCO2e",
    "dollars": "USD",
}


@dataclass(frozen=True)
class Attempt:
    """The lines of one rank in one attempt."""

    start: Json
    work: tuple[Json, ...]


def read_ledger(folder: Path) -> list[Attempt]:
    """Every attempt of every rank of a run. Raises UserError for a folder without a ledger, or a damaged one."""
    files = sorted(folder.glob("ledger*.jsonl"))
    if not (folder / "ledger.jsonl").is_file():
        raise UserError(f"{folder} holds no ledger.jsonl: give the folder of a run that this version trained.")
    attempts = []
    for file in files:
        rows = all_lines(file, {"kind": (str,)})
        for number in sorted({row["attempt"] for row in rows}):
            own = [row for row in rows if row["attempt"] == number]
            starts = [row for row in own if row["kind"] == "start"]
            if len(starts) != 1:
                raise UserError(f"{file}: attempt {number} has {len(starts)} lines of kind 'start', it must have one.")
            work = tuple(row for row in own if row["kind"] == "work")
            for row in work:
                if not isinstance(row.get("seconds"), NUMBER) or not isinstance(row.get("joules"), dict):
                    raise UserError(f"{file}: a line of attempt {number} lacks seconds or joules: restore the file.")
            attempts.append(Attempt(starts[0], work))
    if not attempts:
        raise UserError(
            f"{folder / 'ledger.jsonl'} has no whole line: the run was killed as it began, resume or delete it."
        )
    return attempts


def account(folder: Path, cost: Cost | None = None) -> Json:
    """What one run has used: graded numbers {value, grade, source} or null, and plain counts. `cost`: rates to charge instead."""
    attempts = read_ledger(folder)
    first = [attempt for attempt in attempts if attempt.start["rank"] == 0]
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    joules = _joules(attempts)
    charges = [_charge(attempt, cost) for attempt in attempts]
    steps = [row for attempt in first for row in attempt.work if row["phase"] == "step" and "tokens" in row]
    kept = [row["bytes_kept"] for attempt in first for row in attempt.work if "bytes_kept" in row]
    return {
        "run": str(folder),
        "status": summary.get("status", "unfinished"),
        "attempts": len(first),
        "ranks": max(attempt.start["world_size"] for attempt in attempts),
        "device": first[-1].start["device"],
        "steps": len(steps),
        "repeated_steps": len(steps) - len({row["step"] for row in steps}),
        "tokens": sum(row.get("tokens", 0) for row in steps),
        "repeated_seconds": _repeated(first),
        "phases": _by(first, lambda row: {row["phase"]: row["seconds"]}),
        "seconds": Graded(_seconds(first), "measured", "wall clock").as_json(),
        "device_hours": Graded(_seconds(attempts) / 3600, "measured", "wall clock of every rank").as_json(),
        "flops": _flops(attempts).as_json(),
        "joules": None if joules is None else joules.as_json(),
        "joules_by_part": _by(attempts, lambda row: {part: value or 0.0 for part, value in row["joules"].items()}),
        **{name: _sum([getattr(one, name) for one in charges]) for name in ("kwh", "gco2e", "dollars")},
        "peak_memory_bytes": max((row["peak_memory_bytes"] for a in attempts for row in a.work), default=0),
        "checkpoint_bytes_written": sum(row.get("bytes_written", 0) for attempt in first for row in attempt.work),
        "checkpoint_bytes_kept": kept[-1] if kept else None,
    }


def project(folders: Sequence[Path], cost: Cost | None = None) -> Json:
    """The accounts of all runs in some folders, at any depth, and their sum; a run that is named twice counts once.

    An amount that some run does not know is null in the sum. Raises UserError where a folder holds no run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = sorted(path.parent for path in folder.rglob("ledger.jsonl"))
        if not runs:
            raise UserError(f"{folder} holds no ledger.jsonl, at any depth: give the folder of a run, or of several.")
        found |= {run.resolve(): run for run in runs}
    accounts = [account(run, cost) for run in found.values()]
    total: Json = {"runs": len(accounts), "unfinished": sum(a["status"] != "finished" for a in accounts)}
    for name in ("attempts", "steps", "repeated_steps", "tokens", "repeated_seconds", "checkpoint_bytes_written"):
        total[name] = sum(a[name] for a in accounts)
    for name in (*AMOUNTS, "joules"):
        total[name] = _sum([None if a[name] is None else Graded(**a[name]) for a in accounts])
    total["peak_memory_bytes"] = max(a["peak_memory_bytes"] for a in accounts)
    return {"schema_version": 1, "runs": accounts, "total": total}


def of_arms(folders: Mapping[str, Sequence[Path]]) -> Json | None:
    """What each arm of a comparison has used, and all of them: `arms` and `total`; null where a run has no ledger."""
    if not all((folder / "ledger.jsonl").is_file() for runs in folders.values() for folder in runs):
        return None
    arms = {arm: project(runs)["total"] for arm, runs in folders.items()}
    every = [folder for runs in folders.values() for folder in runs]
    return {"arms": arms, "total": project(every)["total"]}


def cost_of_knowing(result: Json) -> str:
    """What a comparison took, and how much of it went to anything but the sparse arm, in a sentence."""
    total, sparse = result["total"], result["arms"]["sparse"]
    known = [name for name in ("seconds", "kwh", "gco2e", "dollars") if total[name] is not None]
    parts = ", ".join(f"{amount(total[name], UNITS[name])} ({total[name]['grade']})" for name in known)
    share = 1 - sparse["seconds"]["value"] / total["seconds"]["value"]
    return f"All {total['runs']} runs took {parts}; {share:.0%} of the time went to what the sparse model is compared with."


# ------------------------------------------------------------------------------------------------------------- sums


def _seconds(attempts: Iterable[Attempt]) -> float:
    return sum(row["seconds"] for attempt in attempts for row in attempt.work)


def _by(attempts: Iterable[Attempt], parts: Any) -> dict[str, float]:
    """Sums by name of what `parts` finds in each line."""
    sums: dict[str, float] = {}
    for attempt in attempts:
        for row in attempt.work:
            for name, value in parts(row).items():
                sums[name] = sums.get(name, 0.0) + value
    return sums


def _repeated(attempts: Sequence[Attempt]) -> float:
    """Seconds of rank 0's steps that a later attempt did again: lost work."""
    rows = [(attempt.start["attempt"], row) for attempt in attempts for row in attempt.work if row["phase"] == "step"]
    last = {row["step"]: number for number, row in sorted(rows, key=lambda pair: pair[0])}
    return sum(row["seconds"] for number, row in rows if number < last[row["step"]])


def _flops(attempts: Sequence[Attempt]) -> Graded:
    """What was done: counted in the first work of each kind of an attempt, or by formula and then estimated."""
    rows = [row for attempt in attempts for row in attempt.work if "flops" in row]
    grade = worst(row["flops_grade"] for row in rows) if rows else "measured"  # killed in its set-up: nothing was done
    return Graded(sum(row["flops"] for row in rows), grade, "counted by torch" if grade == "measured" else "by formula")


def _energy(attempt: Attempt) -> Graded | None:
    """Joules of one rank in one attempt; None where a device has no meter, or one could not be read."""
    if not attempt.start["complete"] or any(value is None for row in attempt.work for value in row["joules"].values()):
        return None
    meters = attempt.start["meters"]
    value = sum(sum(row["joules"].values()) for row in attempt.work)
    return Graded(value, worst(m["grade"] for m in meters), "; ".join(f"{m['part']}: {m['source']}" for m in meters))


def _joules(attempts: Sequence[Attempt]) -> Graded | None:
    return _graded_sum([_energy(attempt) for attempt in attempts])


def _charge(attempt: Attempt, cost: Cost | None) -> Charge:
    own: Rates = rates_from_json(attempt.start["rates"])
    rates = own if cost is None else rates_of(cost, attempt.start["device"])
    return charge(_energy(attempt), Graded(_seconds([attempt]), "measured", "wall clock"), rates)


def _graded_sum(parts: Sequence[Graded | None]) -> Graded | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    grade: Grade = worst(part.grade for part in known)
    sources = list(dict.fromkeys(part.source for part in known))
    shown = "; ".join(sources[:3]) + (f"; and {len(sources) - 3} more" if len(sources) > 3 else "")
    return Graded(sum(part.value for part in known), grade, shown)


def _sum(parts: Sequence[Graded | None]) -> Json | None:
    total = _graded_sum(parts)
    return None if total is None else total.as_json()


# ------------------------------------------------------------------------------------------------------------ words


def describe(result: Json) -> str:
    """The ledger of a project in words: a line per run, then the sum, each number with its grade."""
    lines = [
        f"{a['run']}: {a['status']}, {a['attempts']} attempt(s), {a['ranks']} rank(s) on {a['device']}, {a['steps']} steps "
        f"({a['repeated_steps']} of them done again), "
        + ", ".join(f"{amount(a[name], UNITS[name])}" for name in ("seconds", "kwh", "dollars"))
        for a in result["runs"]
    ]
    total = result["total"]
    lines += [
        "",
        f"{total['runs']} run(s), {total['unfinished']} of them not finished, {total['attempts']} attempt(s):",
    ]
    for name in ("seconds", "device_hours", "flops", "joules", "kwh", "gco2e", "dollars"):
        entry = total[name]
        known = f"{entry['grade']}: {entry['source']}" if entry else "a run lacks it"
        lines.append(f"  {amount(entry, UNITS[name]):>18}  {known}")
    lost = total["repeated_seconds"]
    lines.append(f"  {lost:>16,.1f} s  of steps that were done again after a kill or a failure, counted above")
    lines.append(f"  {total['checkpoint_bytes_written']:>14,} B  written to checkpoints, measured")
    lines.append(f"  {total['peak_memory_bytes']:>14,} B  peak memory of a rank, measured")
    return "\n".join(lines)


def amount(entry: Json | None, unit: str) -> str:
    """A graded number with its unit, four digits; `unknown` for null."""
    if entry is None:
        return f"unknown {unit}"
    value = entry["value"]
    text = f"{value:,.1f}" if 100 <= value < 1e6 else f"{value:.4g}"
    return f"{text} {unit}"
