"""The page, figure and numbers of scripts/experiments/routers, from the files of its runs and nothing else.

A gain is the baseline's final bits per byte minus the router's, paired by seed: above 0 the router is better.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.paired import t_interval
from moe.analysis.plots import BLUE, GREY, STYLE, VERMILLION
from moe.analysis.rows import RunRows, read_json, read_run
from moe.analysis.summaries import by_layer, rows_per_position
from moe.config.load import resolve_router
from moe.files import write_json

TAIL = 0.2
"""Share of the logged steps, from the end, over which loads are averaged."""


@dataclass(frozen=True)
class Row:
    """One arm; loads are means over seeds, expert layers and the last logged steps, and None for the dense twin."""

    arm: str
    causal: bool
    bits: list[float]
    """Final validation bits per byte of each seed."""
    seeds: list[int]
    gain: float
    """Mean over seeds of the baseline's bits minus this arm's."""
    gain_low: float | None
    gain_high: float | None
    """Its 95 % t interval; None with one seed."""
    max_vio: float | None
    max_vio_floor: float | None
    load_entropy: float | None
    dead_experts: float | None
    rows_per_token: float | None
    milliseconds: float
    """CPU time of a step, median over rounds."""
    cost: float
    """Step time over the baseline's: median over rounds of the ratio within a round."""
    cost_low: float
    cost_high: float
    """Quartiles of that ratio."""


def tail(run: RunRows, name: str) -> float | None:
    """Mean of a routing field over the expert layers and the last logged steps."""
    layers = by_layer(run)
    values = [row[name] for rows in layers.values() for row in rows[-max(1, round(TAIL * len(rows))) :]]
    return float(np.mean(values)) if values else None


def mean_or_none(values: list[float | None]) -> float | None:
    """Mean over seeds, None where there is nothing."""
    return float(np.mean([v for v in values if v is not None])) if None not in values else None


def finished(out: Path, arm: str, seeds: int) -> dict[int, RunRows]:
    """An arm's finished runs by seed."""
    folders = {seed: out / f"{arm}-seed{seed}" for seed in range(seeds)}
    done = [seed for seed, folder in folders.items() if (folder / "summary.json").exists()]
    return {
        seed: read_run(folders[seed])
        for seed in done
        if read_json(folders[seed] / "summary.json")["status"] == "finished"
    }


def summarise(out: Path, arms: list[str], seeds: int, baseline: str) -> list[Row]:
    """The arms, best first, each over the seeds that it and the baseline have finished."""
    timing = read_json(out / "timing.json")
    speed = {arm: np.array(values) for arm, values in timing["tokens_per_cpu_second"].items()}
    by_seed = {arm: finished(out, arm, seeds) for arm in arms}
    rows = []
    for arm in arms:
        shared = [seed for seed in by_seed[arm] if seed in by_seed[baseline]]
        runs = {arm: [by_seed[arm][seed] for seed in shared]}
        bits = [run.final_bits for run in runs[arm]]
        gain = t_interval([by_seed[baseline][seed].final_bits - own for seed, own in zip(shared, bits, strict=True)])
        ratio = speed[baseline] / speed[arm]
        low, middle, high = (float(q) for q in np.percentile(ratio, [25, 50, 75]))
        rows_run = [np.mean([*rows_per_position(run).values()]) if run.routing else None for run in runs[arm]]
        rows.append(
            Row(
                arm=arm,
                causal=arm == "dense" or resolve_router(arm.split("+")[0]).Router.causal,
                bits=bits,
                seeds=shared,
                gain=gain.mean,
                gain_low=gain.low,
                gain_high=gain.high,
                **{
                    name: mean_or_none([tail(run, name) for run in runs[arm]])
                    for name in ("max_vio", "max_vio_floor", "load_entropy", "dead_experts")
                },
                rows_per_token=mean_or_none([None if r is None else float(r) for r in rows_run]),
                milliseconds=float(np.median(1000 * timing["tokens_per_step"] / speed[arm])),
                cost=middle,
                cost_low=low,
                cost_high=high,
            )
        )
    return sorted(rows, key=lambda row: -row.gain)


# ------------------------------------------------------------------------------------------------------------ figure


def plot(rows: list[Row], baseline: str, path: Path) -> None:
    """Gain with interval, load and cost of every arm, best on top."""
    place = np.arange(len(rows))[::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.4 + 0.26 * len(rows)), layout="constrained")
        gain, load, cost = figure.subplots(1, 3, sharey=True, width_ratios=[2.2, 1, 1])
        _gains(gain, rows, place, baseline)
        for y, row in zip(place, rows, strict=True):
            colour = BLUE if row.causal else VERMILLION
            if row.max_vio is not None:
                load.plot(row.max_vio, y, "o", color=colour)
                load.plot(row.max_vio_floor, y, "|", color=GREY, markersize=8)
            cost.errorbar(
                row.cost, y, xerr=[[row.cost - row.cost_low], [row.cost_high - row.cost]], color=colour, fmt="o"
            )
        load.set(xlabel="MaxVio at the end\n(|: noise floor)", xlim=(0, None))
        cost.axvline(1, color="black", linewidth=1)
        cost.set(xlabel=f"CPU time of a step\n(× {baseline}, quartiles)", xlim=(0, None))
        gain.set_yticks(place, [row.arm for row in rows])
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _gains(axes: Axes, rows: list[Row], place: np.ndarray, baseline: str) -> None:
    axes.axvline(0, color="black", linewidth=1)
    for y, row in zip(place, rows, strict=True):
        colour = GREY if row.arm == "dense" else BLUE if row.causal else VERMILLION
        low, high = row.gain_low, row.gain_high
        bars = None if low is None or high is None else [[row.gain - low], [high - row.gain]]
        axes.errorbar(row.gain, y, xerr=bars, color=colour, fmt="D", markersize=4, capsize=3)
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_xlabel(
        f"Gain over {baseline} in bits per byte, paired by seed, 95 %\n(right is better; orange: not causal)"
    )


# -------------------------------------------------------------------------------------------------------------- page


def _cell(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(rows: list[Row]) -> list[str]:
    """The ranking in Markdown."""
    lines = [
        "| | router | seeds | bits per byte | gain [95 %] | MaxVio (floor) | load entropy | dead | rows | ms per step | × |",
        "| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for number, row in enumerate(rows, 1):
        interval = "" if row.gain_low is None else f" [{row.gain_low:+.4f}, {row.gain_high:+.4f}]"
        violation = "–" if row.max_vio is None else f"{row.max_vio:.2f} ({row.max_vio_floor:.2f})"
        name = f"`{row.arm}`" + ("" if row.causal else " †")
        lines.append(
            f"| {number} | {name} | {len(row.seeds)} | {np.mean(row.bits):.4f} | {row.gain:+.4f}{interval} | {violation} "
            f"| {_cell(row.load_entropy, 3)} | {_cell(row.dead_experts, 1)} | {_cell(row.rows_per_token)} "
            f"| {row.milliseconds:.0f} | {row.cost:.2f} |"
        )
    return lines


def page(rows: list[Row], run: RunRows, seeds: int, baseline: str, command: str) -> str:
    """The whole page."""
    config, moe = run.config, run.config["model"]["moe"]
    tokens = config["train"]["steps"] * config["train"]["batch_rows"] * config["data"]["sequence_length"]
    better = [
        f"`{r.arm}`" for r in rows if r.causal and r.gain_low is not None and r.gain_low > 0 and r.arm != baseline
    ]
    worse = [f"`{r.arm}`" for r in rows if r.gain_high is not None and r.gain_high < 0]
    shape = (
        f"({config['model']['num_layers']} layers, D = {config['model']['dim']}, K = {moe['top_k']} of "
        f"E = {moe['num_experts']} experts of {moe['expert_hidden']})"
    )
    lines = [
        "# Every router on the same batches",
        "",
        f"Written by `{command}` from the files of its runs; nothing here is edited by hand.",
        "The numbers, seed by seed, are in [routers.json](routers.json).",
        "",
        f"Every router with its own defaults at the size of `recipes/smoke.py` {shape}:",
        f"{config['train']['steps']} steps, {tokens / 1e6:.2f} million bytes of Python source, the same batches in the same order",
        f"in all arms, learning rate {config['train']['optimizer']['lr']:g} for all, {seeds} seeds (fewer where a row says so).",
        f"`dense` is the dense twin of `{baseline}` at equal FLOPs.",
        "",
        f"* **gain**: bits per byte of the final validation, `{baseline}` minus the router, paired by seed, with a 95 % t interval",
        f"  over the seeds; above 0 is better. Each interval stands alone: of {len(rows) - 1}, one in twenty misses by chance.",
        f"* **loads**: means over layers, seeds and the last {TAIL:.0%} of the logged steps; MaxVio beside the floor that chance",
        "  gives a perfect router. Rows, per token: computed ones, after drops, mean over the run.",
        "* **ms per step**: CPU time (not wall time) of a training step from the end of the run, one thread, median over rounds in",
        f"  which all arms take turns; ×: its ratio to `{baseline}`.",
        "* † not causal: tokens see later ones through the router, so its loss is flattered.",
        "",
        "![Gain, load and cost of every router](routers.png)",
        "",
        f"Interval above 0 (causal): {', '.join(better) or 'none'}. Interval below 0: {', '.join(worse) or 'none'}.",
        "",
        *table(rows),
        "",
        "Differences within a family are smaller than the intervals at this size, and the size is tiny: this shows which routers",
        "train as they should out of the box, what they cost and how even they are, not which one to take at scale.",
        "",
    ]
    return "\n".join(lines)


def write_report(out: Path, arms: list[str], seeds: int, baseline: str, command: str, target: Path) -> Path:
    """Write routers.md, routers.png and routers.json into `target`; returns the page."""
    rows = summarise(out, arms, seeds, baseline)
    target.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {"schema_version": 1, "command": command, "rows": [asdict(row) for row in rows]}
    write_json(target / "routers.json", numbers)
    plot(rows, baseline, target / "routers.png")
    text = page(rows, read_run(out / f"{baseline}-seed0"), seeds, baseline, command)
    (target / "routers.md").write_text(text, encoding="utf-8")
    return target / "routers.md"
