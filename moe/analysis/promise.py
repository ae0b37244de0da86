"""A promise: the gain that a comparison is expected to show, sealed before it begins, and held against it afterwards.

The seal is the SHA-256 of the promise's other fields. Every run of a comparison that is started under a promise carries the seal
in its own settings, so in run.json and in each checkpoint: whoever changes the promise later has to change all of those.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moe.analysis.contracts import CONTRACTS
from moe.analysis.paired import t_interval
from moe.analysis.rows import NUMBER, Json, RunRows, read_json
from moe.errors import UserError

FIELDS = {
    "written": (str,),
    "contract": (str,),
    "gain": NUMBER,
    "low": NUMBER,
    "high": NUMBER,
    "error_rate": NUMBER,
    "config": (str,),
    "sha256": (str,),
}
FILE = "promise.json"


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def config_digest(config: Json) -> str:
    """Digest of what a promise is about: model, data and training, but not seed, learning rate, threads, device or backend."""
    moe = config["model"].get("moe")
    model = {**config["model"], "moe": {k: v for k, v in moe.items() if k != "backend"} if moe else None}
    train = {k: v for k, v in config["train"].items() if k not in ("optimizer", "threads", "device")}
    return digest(
        {"model": model, "data": {k: v for k, v in config["data"].items() if k != "cache_dir"}, "train": train}
    )


def sealed(fields: Json) -> Json:
    """The fields with their seal. Raises UserError for a promise that says nothing."""
    if fields["contract"] not in CONTRACTS:
        raise UserError(f"a promise's contract must be one of {', '.join(CONTRACTS)}, found {fields['contract']!r}.")
    if not fields["low"] <= fields["gain"] <= fields["high"]:
        raise UserError(
            f"the promised gain ({fields['gain']:g}) must lie in its interval [{fields['low']:g}, {fields['high']:g}]: "
            "give --low below and --high above it."
        )
    if not 0 < fields["error_rate"] < 0.5:
        raise UserError(f"an error rate must be above 0 and below 0.5, found {fields['error_rate']:g}: e.g. 0.1.")
    return {**fields, "sha256": digest(fields)}


def read_promise(path: Path) -> Json:
    """Read a promise, whether or not its seal holds. Raises UserError for a file that is none."""
    return read_json(path, FIELDS)


def seal_holds(promise: Json) -> bool:
    """Whether nothing in it has changed since it was sealed."""
    return promise["sha256"] == digest({name: value for name, value in promise.items() if name != "sha256"})


def tampering(promise: Json | None, sparse: Sequence[RunRows], dense: Sequence[RunRows]) -> list[str]:
    """What speaks against a promise having been made, as it stands, before these runs; a sentence each."""
    runs = [*sparse, *dense]
    carried = {run.path.name: (run.config.get("logging") or {}).get("promise", "") for run in runs}
    if promise is None:
        seals = sorted({seal for seal in carried.values() if seal})
        return [f"The runs were started under the promise {seal[:12]}, which is missing." for seal in seals]
    found = []
    if not seal_holds(promise):
        found.append("The promise was changed after it was sealed: its SHA-256 is not that of its content.")
    others = [name for name, seal in carried.items() if seal != promise["sha256"]]
    if others:
        found.append(f"Not started under this promise, but under another or none: {', '.join(others)}.")
    first = min(_time(run.meta["started"]) for run in runs)
    if _time(promise["written"]) > first:
        found.append(f"The promise was written ({promise['written']}) after the first run began ({first.isoformat()}).")
    about = [run.path.name for run in sparse if config_digest(run.config) != promise["config"]]
    if about:
        found.append(f"The promise is about another model, data or training than {', '.join(about)}.")
    return found


def outcome(promise: Json, gains: Sequence[float]) -> Json:
    """The gains of the promised contract, one per seed, against the promise.

    With their interval at confidence 1 - error_rate: `kept` if it lies above the promised low end, `broken` if below it,
    else `undecided`; a promise that was tampered with is for the reader to judge.
    """
    interval = t_interval(list(gains), 1 - promise["error_rate"])
    if interval.low is None or interval.high is None:
        verdict = "undecided"
    else:
        verdict = (
            "kept" if interval.low >= promise["low"] else "broken" if interval.high < promise["low"] else "undecided"
        )
    return {"verdict": verdict, "mean": interval.mean, "low": interval.low, "high": interval.high}


def quote(promise: Json | None, warnings: Sequence[str], result: Json | None) -> list[str]:
    """The promise, what became of it, and what speaks against it, in sentences."""
    lines = []
    if promise is not None:
        lines.append(
            f"Promised on {promise['written']}, at {CONTRACTS[promise['contract']]}: a gain of {promise['gain']:+.4f} "
            f"[{promise['low']:+.4f}, {promise['high']:+.4f}] bits per byte, error rate {promise['error_rate']:g} "
            f"(seal {promise['sha256'][:12]})."
        )
        if result is None:
            lines.append("What became of it cannot be judged: that contract needs --contracts.")
        else:
            ends = "" if result["low"] is None else f" [{result['low']:+.4f}, {result['high']:+.4f}]"
            lines.append(f"The promise is {result['verdict']}: measured {result['mean']:+.4f}{ends}.")
    return lines + [f"TAMPERING: {warning}" for warning in warnings]


def _time(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        raise UserError(f"a time must look like 2026-11-22T10:00:00+0000, found {text!r}.") from None
