"""Reading a run directory: what the trainer logged, checked line by line, without torch.

Lines are append-only and carry `attempt`: of a key (step, or step and layer) the last attempt wins. A last line that
was cut off by a kill is ignored; anything else that is malformed is an error naming file and line.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from moe.errors import UserError

SCHEMA_VERSION = 1
Json = dict[str, Any]

NUMBER = (int, float)
MAYBE_NUMBER = (int, float, type(None))
"""The trainer writes what is not finite as null."""
METRICS = {"step": (int,), "loss": MAYBE_NUMBER, "tokens": NUMBER, "step_seconds": NUMBER}
ROUTING = {
    "step": (int,),
    "layer": (int,),
    "counts": (list,),
    "load_entropy": NUMBER,
    "effective_experts": NUMBER,
    "max_vio": NUMBER,
    "max_vio_floor": NUMBER,
    "dead_experts": NUMBER,
    "drop_rate": NUMBER,
}
EVALS = {"step": (int,), "final": (bool,), "tokens": NUMBER, "bytes": NUMBER, "bits_per_byte": MAYBE_NUMBER}
SUMMARY = {
    "status": (str,),
    "step": (int,),
    "tokens": NUMBER,
    "seconds": NUMBER,
    "parameters_total": (int,),
    "parameters_active": NUMBER,
    "train_flops_per_token": NUMBER,
}


@dataclass(frozen=True)
class FinalRows:
    """The final evaluation, one entry per validation row: [rows] float64 each."""

    nats: np.ndarray
    """Negative log-likelihood summed over the row's targets."""
    bytes: np.ndarray
    """UTF-8 bytes that those targets stand for."""
    tokens: np.ndarray
    """Targets in the row."""

    @property
    def bits_per_byte(self) -> float:
        """Sum of nats over sum of bytes, in bits."""
        return float(self.nats.sum() / self.bytes.sum() / math.log(2))


@dataclass(frozen=True)
class RunRows:
    """Everything that one run logged. Lists are sorted by step (and layer)."""

    path: Path
    config: Json
    """The resolved `Run`, as JSON."""
    meta: Json
    """Versions, threads, device, commit."""
    metrics: list[Json]
    routing: list[Json]
    """Empty for a dense model."""
    evals: list[Json]
    summary: Json
    final_rows: FinalRows | None

    @property
    def final(self) -> Json:
        """The last final evaluation; of a run that was cut short, its last evaluation (whose `final` is False)."""
        rows = [row for row in self.evals if row["final"]] or self.evals
        if not rows:
            raise UserError(f"{self.path / 'evals.jsonl'} has no evaluation: resume the run until it finishes.")
        return rows[-1]

    @property
    def final_bits(self) -> float:
        """Bits per byte of the final evaluation; NaN if it was not finite or there is none yet."""
        bits = self.final["bits_per_byte"] if self.evals else None
        return math.nan if bits is None else float(bits)

    @property
    def layers(self) -> list[int]:
        """True indices of the expert layers, ascending."""
        return sorted({row["layer"] for row in self.routing})


def _step(row: Json) -> tuple[int, ...]:
    return (row["step"],)


def _step_and_layer(row: Json) -> tuple[int, ...]:
    return (row["step"], row["layer"])


def _step_and_kind(row: Json) -> tuple[int, ...]:
    return (row["step"], row["final"])


def _check(row: Any, fields: dict[str, tuple[type, ...]], where: str) -> Json:
    """Check a parsed line's schema version and the types of the fields that analysis uses."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {json.dumps(row)[:60]}.")
    if row.get("schema_version") != SCHEMA_VERSION:
        version = row.get("schema_version", "none")
        raise UserError(
            f"{where}: schema_version is {version}, this version reads {SCHEMA_VERSION}: "
            "use the moe-lab version that wrote the run."
        )
    for name, kinds in fields.items():
        if name not in row:
            raise UserError(f"{where}: the field {name!r} is missing.")
        value = row[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UserError(f"{where}: {name!r} must be {wanted}, found {json.dumps(value)[:60]}.")
    return row


def read_json(path: Path, fields: dict[str, tuple[type, ...]] | None = None) -> Json:
    """Read one JSON object with a schema_version; errors name the file."""
    try:
        row = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {path.parent} is no complete run or comparison directory.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    return _check(row, fields or {}, str(path))


def read_lines(path: Path, fields: dict[str, tuple[type, ...]], key: Callable[[Json], tuple[int, ...]]) -> list[Json]:
    """Read a JSON-lines file, last attempt of each key only, sorted by key. Errors as of `all_lines`."""
    rows: dict[tuple[int, ...], Json] = {}
    for row in all_lines(path, fields):
        previous = rows.get(key(row))
        if previous is None or previous["attempt"] <= row["attempt"]:
            rows[key(row)] = row
    return [rows[k] for k in sorted(rows)]


def all_lines(path: Path, fields: dict[str, tuple[type, ...]]) -> list[Json]:
    """Read a JSON-lines file, the lines of all attempts as they were written.

    A last line without newline that does not parse is ignored: its writer was killed. Raises UserError naming the
    line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {path.parent} is no complete run directory.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{where}: not JSON ({error}): restore the file, or delete the line.") from error
        rows.append(_check(row, {"attempt": (int,), **fields}, where))
    return rows


def read_final_rows(path: Path) -> FinalRows | None:
    """Read the per-row results of the final evaluation, or None where the run wrote none."""
    if not path.exists():
        return None
    names = ("nats_row", "bytes_row", "tokens_row")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            nats, sizes, tokens = (np.asarray(arrays[name], dtype=np.float64) for name in names)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is not a readable file of {', '.join(names)}: {error}.") from error
    if nats.ndim != 1 or not nats.shape == sizes.shape == tokens.shape or not nats.size:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(names, (nats, sizes, tokens), strict=True))
        raise UserError(f"{path}: the three arrays must have one entry per validation row, found {shapes}.")
    return FinalRows(nats, sizes, tokens)


def read_routing(path: Path) -> list[Json]:
    """Read routing.jsonl; every line of a layer must count the same number of experts."""
    rows = read_lines(path, ROUTING, _step_and_layer)
    experts: dict[int, int] = {}
    for row in rows:
        found = len(row["counts"])
        if experts.setdefault(row["layer"], found) != found or not found:
            raise UserError(
                f"{path}: layer {row['layer']} counts {experts[row['layer']]} experts at first and {found} at step "
                f"{row['step']}: the file mixes two runs."
            )
    return rows


def read_run(directory: Path, unfinished: Json | None = None) -> RunRows:
    """Read a run directory. Raises UserError naming what is missing or malformed.

    `unfinished`: of a run without a summary.json that holds, what it would say of the model; what its log says is added, and
    steps and evaluations may be missing.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory.")
    header = read_json(directory / "run.json", {"run": (dict,), "meta": (dict,)})
    routing, evals = directory / "routing.jsonl", directory / "evals.jsonl"
    steps = directory / "metrics.jsonl"
    metrics = read_lines(steps, METRICS, _step) if unfinished is None or steps.exists() else []
    return RunRows(
        path=directory,
        config=header["run"],
        meta=header["meta"],
        metrics=metrics,
        routing=read_routing(routing) if routing.exists() else [],
        evals=read_lines(evals, EVALS, _step_and_kind) if unfinished is None or evals.exists() else [],
        summary=read_json(directory / "summary.json", SUMMARY) if unfinished is None else unfinished | _so_far(metrics),
        final_rows=read_final_rows(directory / "final_rows.npz"),
    )


def _so_far(metrics: list[Json]) -> Json:
    """The totals of a summary, from the steps logged so far."""
    memory = [row["memory_bytes"] for row in metrics if row.get("memory_bytes")]
    return {
        "step": metrics[-1]["step"] if metrics else 0,
        "tokens": metrics[-1]["tokens"] if metrics else 0,
        "seconds": math.fsum(row["step_seconds"] for row in metrics),
        "peak_memory_bytes": max(memory, default=None),
        "skipped_steps": sum(bool(row.get("skipped")) for row in metrics),
    }
