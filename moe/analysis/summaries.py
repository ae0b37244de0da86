"""What runs and arms amount to, as JSON-able values: the contents of report.json, computed from rows alone."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe.analysis.rows import Json, RunRows

FLOPS_TOLERANCE = 0.005
"""Largest relative difference of training FLOPs per token between arms that still counts as equal."""
TAIL = 0.1
"""Share of the logged steps, from the end, over which routing health is averaged."""

# What may differ between the arms of a comparison.
ARM_FIELDS = ("name", "model.moe", "model.ffn_hidden", "model.ffn_hidden_per_layer")


def finite(value: Any) -> Any:
    """The value with every non-finite number replaced by None, so that it is valid JSON."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def flatten(config: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested config; None and empty lists count as absent."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            yield prefix + name, value


def differences(left: Json, right: Json) -> list[tuple[str, Any, Any]]:
    """Fields that differ between two configs, as (dotted name, left, right); None where a side has no such field."""
    a, b = dict(flatten(left)), dict(flatten(right))
    return [(name, a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)]


def belongs_to_arm(name: str) -> bool:
    """Whether a field is one that a dense twin changes."""
    return any(name == field or name.startswith(field + ".") for field in ARM_FIELDS)


def by_layer(run: RunRows) -> dict[int, list[Json]]:
    """Routing rows of each expert layer, by step."""
    layers: dict[int, list[Json]] = {}
    for row in run.routing:
        layers.setdefault(row["layer"], []).append(row)
    return dict(sorted(layers.items()))


def rows_per_position(run: RunRows) -> dict[int, float]:
    """Measured expert rows per position of the batch and layer, after drops, averaged over the logged steps."""
    positions = run.config["train"]["batch_rows"] * run.config["data"]["sequence_length"]
    return {
        layer: float(np.mean([sum(row["counts"]) * (1 - row["drop_rate"]) / positions for row in rows]))
        for layer, rows in by_layer(run).items()
    }


def measured_flops(run: RunRows, expected_rows: float | None) -> float:
    """Training FLOPs per token with measured instead of expected expert rows.

    A row costs 18·D·F, F of its own expert: three matrix products of 2·D·F forward, twice that backward. Drops are logged
    for all experts together, and so spread over them in proportion to their rows.
    """
    flops = float(run.summary["train_flops_per_token"])
    moe = run.config["model"].get("moe")
    if not moe or expected_rows is None:
        return flops
    widths = np.asarray(moe.get("expert_widths") or moe["expert_hidden"], dtype=float)
    positions = run.config["train"]["batch_rows"] * run.config["data"]["sequence_length"]
    hidden = [
        np.mean([np.sum(widths * row["counts"]) * (1 - row["drop_rate"]) / positions for row in rows])
        for rows in by_layer(run).values()
    ]
    dim = moe.get("latent_dim") or run.config["model"]["dim"]
    return flops + 18 * dim * float(sum(hidden) - len(hidden) * expected_rows * widths.mean())


def arm_summary(name: str, runs: Sequence[RunRows], expected_rows: float | None, timing: Json | None) -> Json:
    """One line of the table of arms. tokens_per_second comes from the interleaved timing or is None."""
    summary, finals = runs[0].summary, [run.final_bits for run in runs]
    return {
        "name": name,
        "seeds": [run.config["seed"] for run in runs],
        "runs": [run.path.name for run in runs],
        "parameters_total": summary["parameters_total"],
        "parameters_active": summary["parameters_active"],
        "train_flops_per_token": summary["train_flops_per_token"],
        "measured_flops_per_token": float(np.mean([measured_flops(run, expected_rows) for run in runs])),
        "rows_per_position": {k: v for run in runs[:1] for k, v in rows_per_position(run).items()},
        "tokens": [run.summary["tokens"] for run in runs],
        "final_bits_per_byte": finals,
        "mean_bits_per_byte": float(np.mean(finals)),
        "tokens_per_second": float(np.median(timing[name])) if timing else None,
        "seconds": [run.summary["seconds"] for run in runs],
        "peak_memory_bytes": [run.summary.get("peak_memory_bytes") for run in runs],
        "skipped_steps": [run.summary.get("skipped_steps", 0) for run in runs],
    }


def routing_health(runs: Sequence[RunRows]) -> list[Json]:
    """Per expert layer, each statistic over the last tenth of the logged steps: [mean of seeds, lowest, highest]."""
    names = ("load_entropy", "effective_experts", "max_vio", "max_vio_floor", "dead_experts", "drop_rate")
    optional = ("router_entropy", "logit_max", "margin")
    health = []
    for layer in runs[0].layers:
        line: Json = {"layer": layer}
        tails = []
        for run in runs:
            rows = by_layer(run).get(layer, [])
            tails.append(rows[-max(1, math.ceil(TAIL * len(rows))) :])
        line["experts"] = len(tails[0][0]["counts"])
        line["logged_steps"] = len(tails[0])
        for name in names + optional:
            values = [float(np.mean([row[name] for row in tail])) for tail in tails if tail and name in tail[0]]
            line[name] = [float(np.mean(values)), min(values), max(values)] if values else None
        health.append(line)
    return health


def timing_summary(timing: Json) -> Json:
    """Ratio of tokens per second, sparse over dense, round by round: median and quartiles."""
    ratios = np.asarray(timing["sparse"], dtype=float) / np.asarray(timing["dense"], dtype=float)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    return {
        "ratio": median,
        "low": low,
        "high": high,
        "rounds": len(ratios),
        "threads": timing.get("threads"),
        "device": timing.get("device"),
        "sparse_tokens_per_second": float(np.median(timing["sparse"])),
        "dense_tokens_per_second": float(np.median(timing["dense"])),
    }


def cautions(arms: dict[str, list[RunRows]], summaries: Sequence[Json], learning_rate: Json | None) -> list[str]:
    """Whatever would make a careful reader trust the comparison less, a sentence each."""
    found = []
    for sparse, dense in zip(arms["sparse"], arms["dense"], strict=True):
        pair = f"{sparse.path.name} and {dense.path.name}"
        own = ("train.optimizer.lr",) if (learning_rate or {}).get("per_arm") else ()
        found_here = [name for name, *_ in differences(sparse.config, dense.config)]
        other = [name for name in found_here if not belongs_to_arm(name) and name not in own]
        if other:
            found.append(f"{pair} differ in more than the expert layers: {', '.join(other)}.")
        if sparse.summary["tokens"] != dense.summary["tokens"]:
            found.append(
                f"{pair} trained on different numbers of tokens: "
                f"{sparse.summary['tokens']:,} and {dense.summary['tokens']:,}."
            )
        for name in ("threads", "device", "versions"):
            if sparse.meta.get(name) != dense.meta.get(name):
                found.append(f"{pair} ran with different {name}.")
    flops = [arm["measured_flops_per_token"] for arm in summaries]
    if abs(flops[0] / flops[1] - 1) > FLOPS_TOLERANCE:
        found.append(
            f"Measured training FLOPs per token differ by {100 * (flops[0] / flops[1] - 1):+.2f} %: more than the "
            f"{100 * FLOPS_TOLERANCE:g} % that counts as equal."
        )
    for arm in summaries:
        if any(arm["skipped_steps"]):
            found.append(f"The {arm['name']} arm skipped {sum(arm['skipped_steps'])} steps that were not finite.")
    grid = sorted((learning_rate or {}).get("grid", []))
    if len(grid) > 1 and learning_rate and learning_rate["value"] in (grid[0], grid[-1]):
        found.append(f"The shared learning rate {learning_rate['value']:g} is at the edge of the grid that was tried.")
    return found
