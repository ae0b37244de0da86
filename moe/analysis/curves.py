"""Loss curves of dense and sparse runs in one CSV file: read, checked, selected, and turned into gains over dense.

One row per run and evaluation, plain or gzip. The format is that of the curves published with Clark et al. 2022
(arXiv 2202.01169); docs/forecast.md has the columns.
"""

import csv
import gzip
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.analysis.annealing import read_schedule
from moe.config.schema import Schedule
from moe.errors import DataError

COLUMNS = ("hyper_id", "step", "router_type", "num_experts", "dense_parameter_count", "model_size_label")
"""What every file must have, besides the column of the loss."""
DEFAULTS = {"k": 1.0, "routing_frequency": 0.5, "flop_increase": 1.0}
"""Columns that may be missing or empty, and what that stands for."""
DENSE = "dense"
FINISHED = 0.95
"""A run whose last finite loss lies before this share of its training has no final loss to learn from."""


@dataclass(frozen=True)
class Curve:
    """One run's evaluations, ascending in step, step 0 and losses that are not finite left out."""

    run: str
    router: str
    """As in the file; any spelling of `dense` is the dense reference."""
    experts: int
    size: float
    """Active parameters."""
    label: str
    """The size's name in the file."""
    step_S: np.ndarray
    loss_S: np.ndarray
    """Nats per token."""
    dropped: int
    """Evaluations left out because their loss was not finite."""
    pair: str = ""
    """What a dense run and its sparse runs share; empty where a size's dense runs are the reference of all its sparse runs."""
    schedule: Schedule | None = None
    """Learning rates, if the file tells them."""

    @property
    def is_dense(self) -> bool:
        return self.router.lower() == DENSE

    @property
    def reference(self) -> tuple[float, str]:
        """What runs must share to have one dense reference and one length of training."""
        return self.size, self.pair


@dataclass(frozen=True)
class Gains:
    """Gains of finished sparse runs over the dense run of their size, on one grid of training progress."""

    progress_S: np.ndarray
    """Shares of training, ascending, the last is 1."""
    gain_RS: np.ndarray
    """Dense minus sparse loss, nats per token."""
    size_R: np.ndarray
    experts_R: np.ndarray
    router_R: np.ndarray
    label_R: np.ndarray
    run_R: np.ndarray
    dense_R: np.ndarray
    """Final loss of the dense run of the same size, nats per token."""
    left_out: tuple[str, ...] = ()
    """Runs that were not used, each with the reason."""

    def take(self, keep_R: np.ndarray) -> "Gains":
        """The runs that a mask or an index selects."""
        names = ("gain_RS", "size_R", "experts_R", "router_R", "label_R", "run_R", "dense_R")
        return Gains(self.progress_S, left_out=self.left_out, **{name: getattr(self, name)[keep_R] for name in names})


def read_curves(
    path: Path, *, loss: str = "loss_validation", top_k: float = 1, routing_frequency: float = 0.5
) -> list[Curve]:
    """Dense runs and the sparse runs with this top-k and share of sparse layers, in the file's order.

    Dense runs of enlarged width (`flop_increase` above 1) are left out. Raises DataError naming the file and the line.
    """
    rows = _read_rows(path, loss)
    chosen: dict[str, list[tuple[int, dict[str, str]]]] = {}
    seen: set[tuple[float, float]] = set()
    for line, row in rows:
        where = f"{path}, line {line}"
        k, frequency, flops = (_optional(row, name, where) for name in DEFAULTS)
        dense = row["router_type"].lower() == DENSE
        if not dense:
            seen.add((k, frequency))
        if flops == 1 if dense else (k == top_k and math.isclose(frequency, routing_frequency)):
            chosen.setdefault(row["hyper_id"], []).append((line, row))
    curves = [_curve(path, run, lines, loss) for run, lines in chosen.items()]
    if not any(curve.is_dense for curve in curves):
        raise DataError(f"{path} has no dense run (router_type Dense): a gain needs one dense run for each size.")
    if all(curve.is_dense for curve in curves):
        found = ", ".join(f"k={k:g} routing_frequency={f:g}" for k, f in sorted(seen)) or "none"
        raise DataError(
            f"{path} has no sparse run with k={top_k:g} and routing_frequency={routing_frequency:g} (found: {found}): "
            "choose with --top-k and --routing-frequency."
        )
    return curves


def gains(curves: Sequence[Curve], anchor: float) -> Gains:
    """Gains on a grid from the evaluation nearest to `anchor` (share of training) to the end, at the file's own interval.

    The training of a size (of a pair, where the file has pairs) ends at the largest step of its runs; several dense runs are
    averaged.
    Raises DataError where no sparse run is finished, or evaluations are too far apart for the anchor.
    """
    if not 0 < anchor < 1:
        raise DataError(f"the anchor ({anchor:g}) must be a share of training between 0 and 1: e.g. 0.08.")
    finished, totals, _ = _finished(curves)
    return _gains(curves, _grid([c.step_S / totals[c.reference] for c in finished], anchor))


def final_gains(curves: Sequence[Curve]) -> Gains:
    """Gains at the end alone (one point of the grid), of every finished sparse run with a finished dense run of its size."""
    return _gains(curves, np.ones(1))


def size_of(label: str, found: Gains) -> float:
    """Active parameters of a size by its label. Raises DataError listing the labels there are."""
    sizes = {str(name): float(size) for name, size in zip(found.label_R, found.size_R, strict=True)}
    if label not in sizes:
        known = ", ".join(sorted(sizes, key=lambda name: sizes[name]))
        raise DataError(f"no finished sparse run has the size {label!r}: the file's sizes are {known}.")
    return sizes[label]


def totals_of(curves: Sequence[Curve]) -> dict[tuple[float, str], float]:
    """The last step of training, by `Curve.reference`."""
    totals: dict[tuple[float, str], float] = {}
    for curve in curves:
        if curve.step_S.size:
            totals[curve.reference] = max(totals.get(curve.reference, 0.0), float(curve.step_S[-1]))
    return totals


def _finished(curves: Sequence[Curve]) -> tuple[list[Curve], dict[tuple[float, str], float], list[str]]:
    """Runs that reached the end, the last step of each training, and why the other runs are left out."""
    totals = totals_of(curves)
    finished = [c for c in curves if c.step_S.size > 1 and c.step_S[-1] >= FINISHED * totals[c.reference]]
    left_out = [f"{c.run}: ends before {FINISHED:.0%} of its training" for c in curves if c not in finished]
    return finished, totals, left_out


def _gains(curves: Sequence[Curve], progress_S: np.ndarray) -> Gains:
    finished, totals, left_out = _finished(curves)
    dense: dict[tuple[float, str], list[np.ndarray]] = {}
    for curve in finished:
        if curve.is_dense:
            dense.setdefault(curve.reference, []).append(_at(curve, totals[curve.reference], progress_S))
    sparse = [curve for curve in finished if not curve.is_dense]
    left_out += [f"{c.run}: no finished dense run of {c.label}" for c in sparse if c.reference not in dense]
    sparse = [curve for curve in sparse if curve.reference in dense]
    if not sparse:
        raise DataError(f"no finished sparse run has a finished dense run of its size ({'; '.join(left_out[:3])}).")
    gain_RS = np.stack([np.mean(dense[c.reference], 0) - _at(c, totals[c.reference], progress_S) for c in sparse])
    return Gains(
        progress_S,
        gain_RS,
        size_R=np.array([c.size for c in sparse]),
        experts_R=np.array([c.experts for c in sparse]),
        router_R=np.array([c.router for c in sparse]),
        label_R=np.array([c.label for c in sparse]),
        run_R=np.array([c.run for c in sparse]),
        dense_R=np.array([np.mean(dense[c.reference], 0)[-1] for c in sparse]),
        left_out=tuple(left_out),
    )


def _read_rows(path: Path, loss: str) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV file whose header has every required column."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give a CSV file of loss curves.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: give a CSV file of loss curves.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as CSV text: {error}.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    missing = [name for name in (*COLUMNS, loss) if name not in (reader.fieldnames or ())]
    if missing:
        found = ", ".join(reader.fieldnames or ()) or "none: the file is empty"
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; it has {found}.")
    rows = [(reader.line_num, row) for row in reader]
    if not rows:
        raise DataError(f"{path} has a header and no rows: nothing to fit.")
    return rows


def _curve(path: Path, run: str, lines: list[tuple[int, dict[str, str]]], loss: str) -> Curve:
    line, first = lines[0]
    where = f"{path}, line {line}"
    size, experts = _number(first, "dense_parameter_count", where), _number(first, "num_experts", where)
    if size <= 0 or experts < 1 or experts != int(experts):
        raise DataError(
            f"{where}: dense_parameter_count ({size:g}) must be positive and num_experts ({experts:g}) a whole number "
            "from 1."
        )
    points: dict[float, float] = {}
    dropped = 0
    for number, row in lines:
        if (row["router_type"], row["num_experts"], row["dense_parameter_count"]) != (
            first["router_type"], first["num_experts"], first["dense_parameter_count"],
        ):  # fmt: skip
            raise DataError(
                f"{path}, line {number}: the run {run} changes its router, experts or size: give each run its own hyper_id."
            )
        step, value = _number(row, "step", f"{path}, line {number}"), _loss(row[loss], f"{path}, line {number}", loss)
        if not math.isfinite(value):
            dropped += 1
        elif step > 0:
            points[step] = value
    step_S = np.array(sorted(points))
    loss_S = np.array([points[step] for step in step_S])
    schedule = first.get("schedule", "").strip()
    return Curve(
        run,
        first["router_type"],
        int(experts),
        size,
        first["model_size_label"],
        step_S,
        loss_S,
        dropped,
        first.get("pair", "").strip(),
        read_schedule(schedule, where) if schedule else None,
    )


def _number(row: dict[str, str], name: str, where: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {name} must be a finite number, found {row[name]!r}.")
    return value


def _optional(row: dict[str, str], name: str, where: str) -> float:
    return _number(row, name, where) if row.get(name, "").strip().lower() not in {"", "nan"} else DEFAULTS[name]


def _loss(text: str, where: str, name: str) -> float:
    """A loss; an empty cell is a loss that was not finite. Raises DataError for what is no number."""
    try:
        return float(text) if text.strip() else math.nan
    except ValueError:
        raise DataError(f"{where}: {name} must be a number or empty, found {text!r}.") from None


def _at(curve: Curve, total: float, progress_S: np.ndarray) -> np.ndarray:
    return np.interp(progress_S, curve.step_S / total, curve.loss_S)


def _grid(progress: list[np.ndarray], anchor: float) -> np.ndarray:
    """From the evaluation nearest to the anchor to 1 in steps of the median interval between evaluations."""
    if not progress:
        raise DataError("no run reaches the end of its training: nothing to learn a final gain from.")
    interval = float(np.median(np.concatenate([np.diff(p_S) for p_S in progress])))
    longest = max(progress, key=len)
    start = float(longest[np.argmin(np.abs(longest - anchor))])
    if abs(start - anchor) > 0.5 * anchor or start >= 1:
        raise DataError(
            f"no evaluation lies near {anchor:.3g} of training (the nearest at {start:.3g}, one every {interval:.3g}): "
            "choose another --anchor."
        )
    return np.linspace(start, 1.0, max(2, round((1 - start) / interval) + 1))
