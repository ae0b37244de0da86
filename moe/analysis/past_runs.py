"""Finished runs as a file of past runs, the one that `moe forecast` learns from: sparse runs, each beside its dense twin.

The twin is the one of the same comparison and seed, or else a dense run of the same data, seed, length and schedule whose
FLOPs per token agree. Sizes that differ by less than a tenth get one label, since the number of experts changes the router's size.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe import cost
from moe.analysis.annealing import write_schedule
from moe.analysis.forecast import BEYOND
from moe.analysis.rows import EVALS, SUMMARY, read_json, read_lines
from moe.config.load import dump, load, router_name
from moe.config.schema import Run
from moe.errors import ConfigError, DataError
from moe.files import write_text

Json = dict[str, Any]
HEADER: tuple[str, ...] = (
    "hyper_id", "step", "loss_validation", "num_experts", "router_type", "dense_parameter_count", "model_size_label", "k",
    "routing_frequency", "pair", "seed", "schedule",
)  # fmt: skip
EQUAL_FLOPS = 0.01
COMPARE = "compare.json"


@dataclass(frozen=True)
class Past:
    """One finished run."""

    name: str
    folder: Path
    run: Run
    evals: tuple[tuple[int, float], ...]
    """(step, nats per token) of the evaluations that are not the final one."""

    @property
    def flops(self) -> float:
        return cost.train_flops_per_token(self.run.model, self.run.data.sequence_length)

    def alike(self, other: "Past") -> bool:
        """Whether both see the same batches under the same schedule, at equal FLOPs per token."""
        a, b = self.run, other.run
        same = (
            a.seed == b.seed
            and (a.train.steps, a.train.batch_rows) == (b.train.steps, b.train.batch_rows)
            and (dump(a.data), dump(a.train.schedule)) == (dump(b.data), dump(b.train.schedule))
        )
        return same and abs(self.flops / other.flops - 1) <= EQUAL_FLOPS


def collect(folders: Sequence[Path], out: Path) -> Json:
    """Write the CSV file; returns how many runs and sizes it has, and `left_out` with the reasons.

    Raises DataError where no sparse run has a dense twin, or `out` holds something else.
    """
    _require_free(out)
    found = sorted({path.parent for folder in folders for path in folder.rglob("run.json")})
    if not found:
        raise DataError(
            f"no run.json in {', '.join(map(str, folders))}: give folders of runs, or of many at any depth."
        )
    names = _names(found)
    left_out: list[str] = []
    records: dict[Path, Past] = {}
    for folder in found:
        record, reason = _read(folder, names[folder])
        if record is not None:
            records[folder] = record
        else:
            left_out.append(f"{names[folder]}: {reason}")
    pairs, alone = _pairs(records)
    left_out += alone
    if not pairs:
        raise DataError(
            f"no finished sparse run has a finished dense twin ({'; '.join(left_out[:3]) or 'none is sparse'}): train dense "
            "twins, e.g. with moe compare."
        )
    rows = _rows(pairs)
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out, stream.getvalue())
    labels = {row["model_size_label"]: row["dense_parameter_count"] for row in rows}
    return {
        "schema_version": 1,
        "file": str(out),
        "sparse_runs": len(pairs),
        "dense_runs": len({dense.folder for _, dense in pairs}),
        "sizes": sorted(labels, key=lambda label: labels[label]),
        "experts": sorted({_experts(sparse.run) for sparse, _ in pairs}),
        "kinds": sorted({routing_kind(sparse.run) for sparse, _ in pairs}),
        "left_out": left_out,
    }


def describe(result: Json) -> str:
    """What was collected, in words."""
    kinds = "; ".join(f"--top-k {k:g} --routing-frequency {f:g}" for k, f in result["kinds"])
    lines = [
        f"{result['file']}: {result['sparse_runs']} sparse and {result['dense_runs']} dense runs of {len(result['sizes'])} sizes "
        f"({', '.join(result['sizes'])}), {', '.join(map(str, result['experts']))} experts",
        f"to be read with {kinds}",
    ]
    return "\n".join([*lines, *(f"left out: {reason}" for reason in result["left_out"])])


def comparison_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """(sparse, dense) folders of a comparison, seed by seed. Raises DataError where its arms do not pair."""
    arms = read_json(folder / COMPARE, {"arms": (dict,)})["arms"]
    sparse, dense = (arms.get(arm) for arm in ("sparse", "dense"))
    if not isinstance(sparse, list) or not isinstance(dense, list) or len(sparse) != len(dense) or not sparse:
        raise DataError(f"{folder / COMPARE}: arms must list one sparse and one dense run for each seed.")
    return [(folder / one, folder / other) for one, other in zip(sparse, dense, strict=True)]


def routing_kind(run: Run) -> tuple[float, float]:
    """(experts per token, share of layers with experts) of a sparse run, as the file's columns have them."""
    assert run.model.moe is not None
    return float(run.model.moe.top_k), len(cost.moe_layers(run.model)) / run.model.num_layers


def _experts(run: Run) -> int:
    return run.model.moe.num_experts if run.model.moe is not None else 1


def _require_free(out: Path) -> None:
    """A file may be written again, but only over one that was collected before."""
    if out.is_dir():
        raise DataError(f"--out {out} is a folder: name a CSV file.")
    if out.exists() and not out.read_bytes().startswith(",".join(HEADER).encode()):
        raise DataError(f"--out {out} exists and is no file of past runs: name another, or delete it.")


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Names that tell the runs apart: their folders' below what all have in common."""
    parts = {folder: folder.resolve().parts for folder in folders}
    common = 0
    while len(folders) > 1 and len({part[: common + 1] for part in parts.values()}) == 1:
        common += 1
    return {folder: "/".join(part[common:] or part[-1:]) for folder, part in parts.items()}


def _read(folder: Path, name: str) -> tuple[Past | None, str]:
    """A finished run, or why it is left out."""
    if not (folder / "summary.json").exists():
        return None, "not finished (no summary.json)"
    summary = read_json(folder / "summary.json", SUMMARY)
    if summary["status"] != "finished":
        return None, f"not finished ({summary['status']} at step {summary['step']})"
    try:
        run = load(read_json(folder / "run.json", {"run": (dict,)})["run"])
    except ConfigError as error:
        return None, f"its settings are of another version ({error})"
    rows = read_lines(folder / "evals.jsonl", EVALS, lambda row: (row["step"], row["final"]))
    evals = tuple((row["step"], float(row["loss"])) for row in rows if not row["final"] and row.get("loss") is not None)
    if len(evals) < 3:
        return None, f"{len(evals)} evaluations, 3 are needed: set evaluation.every_steps"
    return Past(name, folder, run, evals), ""


def _pairs(records: dict[Path, Past]) -> tuple[list[tuple[Past, Past]], list[str]]:
    """Sparse runs with their dense twins, and why the others have none."""
    declared: dict[Path, Path] = {}
    for home in sorted({folder.parent for folder in records if (folder.parent / COMPARE).exists()}):
        declared.update(comparison_pairs(home))
    dense = [record for record in records.values() if record.run.model.moe is None]
    pairs, alone = [], []
    for folder, record in records.items():
        if record.run.model.moe is None:
            continue
        if folder in declared and declared[folder] in records:
            pairs.append((record, records[declared[folder]]))
            continue
        if (folder.parent / COMPARE).exists():
            alone.append(f"{record.name}: not the sparse arm of its comparison, or without its twin")
            continue
        twins = [other for other in dense if record.alike(other)]
        if twins:
            pairs.append((record, min(twins, key=lambda twin: _distance(record, twin))))
        else:
            alone.append(f"{record.name}: no dense run of equal FLOPs, data, seed, length and schedule")
    return pairs, alone


def _distance(sparse: Past, twin: Past) -> tuple[bool, bool, float]:
    """The best twin is first: the same learning rate, the same place, the lowest final loss."""
    return (
        sparse.run.train.optimizer.lr != twin.run.train.optimizer.lr,
        sparse.folder.parent != twin.folder.parent,
        twin.evals[-1][1],
    )


def _rows(pairs: Sequence[tuple[Past, Past]]) -> list[Json]:
    """Lines of the file: each dense run once for every size that it is the twin of, then its sparse runs."""
    sizes = {sparse.folder: float(cost.parameters(sparse.run.model).active) for sparse, _ in pairs}
    groups: dict[float, float] = {}
    for size in sorted(set(sizes.values())):
        first = next(reversed(groups.values()), 0.0)
        groups[size] = first if first and size <= first * BEYOND else size
    rows, written = [], set()
    for sparse, dense in sorted(pairs, key=lambda pair: (sizes[pair[0].folder], pair[1].name, pair[0].name)):
        size = groups[sizes[sparse.folder]]
        k, frequency = routing_kind(sparse.run)
        shared = {
            "dense_parameter_count": int(size),
            "model_size_label": _label(size),
            "pair": f"{dense.name}@{_label(size)}",
        }
        if shared["pair"] not in written:
            written.add(shared["pair"])
            rows += _lines(dense, {**shared, "router_type": "Dense", "hyper_id": shared["pair"]})
        assert sparse.run.model.moe is not None
        kind = {"router_type": router_name(sparse.run.model.moe.router), "k": k, "routing_frequency": frequency}
        rows += _lines(sparse, {**shared, **kind, "hyper_id": sparse.name})
    return rows


def _lines(record: Past, fields: Json) -> list[Json]:
    fields = {
        **fields,
        "num_experts": _experts(record.run),
        "seed": record.run.seed,
        "schedule": write_schedule(record.run.train.schedule),
    }
    return [{**fields, "step": step, "loss_validation": loss} for step, loss in record.evals]


def _label(size: float) -> str:
    """A size in three digits: 37.1K, 1.2M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return f"{size:.0f}"
