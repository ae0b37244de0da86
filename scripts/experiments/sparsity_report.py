"""The page, figure and numbers of scripts/experiments/sparsity, from the report.json of its comparisons and nothing else.

A gain is dense minus sparse bits per byte at equal something, paired by seed: above 0 the sparse model is better.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.contracts import CONTRACTS, interpolated
from moe.analysis.paired import t_interval
from moe.analysis.plots import BLUE, GREY, STYLE, VERMILLION
from moe.analysis.rows import read_json
from moe.files import write_json, write_text

Json = dict[str, Any]
SHOWN = {
    "active_parameters": (BLUE, "o"),
    "total_parameters": (VERMILLION, "s"),
    "seconds": (GREY, "^"),
}
"""Contracts in the figure."""
MARK = "<!-- what follows is written by scripts/experiments/sparsity -->"


def _ends(entry: Json, form: str = "+.4f") -> str:
    return "" if entry["low"] is None else f" [{entry['low']:{form}}, {entry['high']:{form}}]"


# ------------------------------------------------------------------------------------------------------------- figure


def _sizes(axes: Axes, results: dict[int, Json], losses: dict[str, Json]) -> None:
    """Final loss against parameters: the dense models, and each sparse model at its active and its total count."""
    dense = sorted((entry["total_parameters"], float(np.mean(entry["loss"]))) for entry in losses.values())
    x, y = np.array(dense).T
    axes.plot(x, y, "D-", color=VERMILLION, label="dense")
    for number, (experts, result) in enumerate(results.items()):
        arm = result["arms"]["sparse"]
        mean, ends = float(np.mean(arm["loss"])), (arm["active_parameters"], arm["total_parameters"])
        axes.plot(ends, (mean, mean), ":", color=BLUE, linewidth=1)
        axes.plot(
            ends[0], mean, "o", color=BLUE, mfc="white", label=None if number else "sparse, at its active parameters"
        )
        axes.plot(ends[1], mean, "o", color=BLUE, label=None if number else "sparse, at all its parameters")
        axes.annotate(f"E = {experts}", (ends[1], mean), xytext=(6, 3), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", xlabel="Parameters, millions", ylabel="Final validation loss in bits per byte")
    ticks = [size for size in (0.25e6, 0.5e6, 1e6, 2e6, 4e6, 8e6) if x[0] / 2 < size < 2 * max(ends[1], x[-1])]
    axes.set_xticks(ticks, [f"{size / 1e6:g}" for size in ticks])
    axes.minorticks_off()
    axes.set_xlim(right=1.7 * max(ends[1], x[-1]))
    axes.legend(loc="upper right")


def _gains(axes: Axes, results: dict[int, Json]) -> None:
    """The gain at each contract against the number of experts, with its interval."""
    for number, (contract, (colour, mark)) in enumerate(SHOWN.items()):
        points = [
            (experts * 1.05 ** (number - 1), entry["gain"])
            for experts, result in results.items()
            for entry in result["contracts"]
            if entry["contract"] == contract and entry["verdict"] is not None
        ]
        for x, gain in points:
            bars = None if gain["low"] is None else [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
            axes.errorbar(x, gain["mean"], yerr=bars, color=colour, fmt=mark, capsize=3)
        axes.plot(
            [x for x, _ in points],
            [gain["mean"] for _, gain in points],
            mark,
            ls="-",
            color=colour,
            label=CONTRACTS[contract],
        )
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="Experts, 2 active", ylabel="Gain over dense in bits per byte, 95 %")
    axes.set_xticks(list(results), [str(experts) for experts in results])
    axes.minorticks_off()
    axes.legend()


def plot(results: dict[int, Json], losses: dict[str, Json], path: Path) -> None:
    """Loss against size, and gain against the number of experts."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _sizes(left, results, losses)
        _gains(right, results)
        figure.savefig(path, dpi=160, metadata={"Software": None})


# ------------------------------------------------------------------------------------------------------------- tables


def arm_table(results: dict[int, Json], losses: dict[str, Json], rates: Json) -> list[str]:
    """What was trained, and how well it ended."""
    lines = [
        "| arm | parameters, active / all | learning rate | bits per byte, seed by seed | mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    arms = {**losses, **{f"E{experts}": result["arms"]["sparse"] for experts, result in results.items()}}
    for result in results.values():
        arms |= {name: arm for name, arm in result["arms"].items() if name in ("hash", "frozen_random")}
    for name, arm in arms.items():
        bits = ", ".join(f"{value:.3f}" for value in arm["loss"])
        lines.append(
            f"| {name} | {arm['active_parameters'] / 1e6:.3f} M / {arm['total_parameters'] / 1e6:.3f} M | "
            f"{rates[name]['value']:g} | {bits} | {np.mean(arm['loss']):.4f} |"
        )
    return lines


def contract_table(results: dict[int, Json]) -> list[str]:
    """The verdict of every contract for every number of experts."""
    lines = [
        f"| contract | {' | '.join(f'{experts} experts' for experts in results)} |",
        "| --- |" + " --- |" * len(results),
    ]
    for number, (contract, name) in enumerate(CONTRACTS.items()):
        cells = []
        for result in results.values():
            entry = result["contracts"][number]
            assert entry["contract"] == contract
            if entry["verdict"] is None:
                cells.append(f"not judged: {entry['why']}")
            else:
                sign = " †" if "extrapolated" in entry["from"] else ""
                cells.append(f"{entry['verdict']} {entry['gain']['mean']:+.3f}{_ends(entry['gain'], '+.3f')}{sign}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def speed_table(results: dict[int, Json]) -> list[str]:
    """Effective dense size, multiplier, tax and net speed."""
    lines = [
        "| experts | effective dense size, times the active | compute multiplier | step-time tax | net speed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for experts, result in results.items():
        size, speed = result["effective_size"], result["speed"]
        wide = size["why"] if size["parameters"] is None else f"{size['over_active']:.2f}"
        if "multiplier" not in speed:
            lines.append(f"| {experts} | {wide} | {speed['why']} | | |")
            continue
        cells = [f"{speed[name]['mean']:.2f}{_ends(speed[name], '.2f')}" for name in ("multiplier", "tax")]
        net = "undecided" if speed["net"] is None else f"{speed['net']:.2f}"
        lines.append(f"| {experts} | {wide} | {' | '.join(cells)} | {net}{_ends(speed, '.2f')} |")
    return lines


def interpolation_check(losses: dict[str, Json]) -> Json:
    """The middle dense model's loss, from the power law through the other two, against what it really came to."""
    low, middle, high = (losses[name] for name in ("active", "total8", "total16"))
    sizes = [entry["total_parameters"] for entry in (low, middle, high)]
    guess = interpolated(sizes[1], (sizes[0], sizes[2]), np.array(low["loss"]), np.array(high["loss"]))
    off = t_interval((guess - np.array(middle["loss"])).tolist())
    return {"mean": off.mean, "low": off.low, "high": off.high, "values": list(off.values)}


def decomposition(results: dict[int, Json]) -> list[str]:
    """What the experts give without a learned router, and what learning adds."""
    parts = [(experts, part) for experts, result in results.items() for part in result["decomposition"]]
    return [
        f"* {experts} experts against the `{part['twin']}` twin: capacity {part['capacity']['mean']:+.4f}"
        f"{_ends(part['capacity'])}, routing {part['routing']['mean']:+.4f}{_ends(part['routing'])} bits per byte."
        for experts, part in parts
    ]


# --------------------------------------------------------------------------------------------------------------- page


def advice(advised: list[Json]) -> list[str]:
    """What following the doctor changed, paired by seed."""
    lines = []
    for entry in advised:
        gain = t_interval([a - b for a, b in zip(entry["as_is"], entry["advised"], strict=True)])
        ends = "" if gain.low is None else f" [{gain.low:+.4f}, {gain.high:+.4f}]"
        bits = ", ".join(f"{value:.3f}" for value in entry["advised"])
        lines.append(
            f"* {entry['arm']} with `{entry['setting']}`: {bits} bits per byte, better by {gain.mean:+.4f}{ends}."
        )
    return lines


def write_report(
    out: Path, experts: tuple[int, ...], twins: dict[int, str], advised: list[Json], command: str, folder: Path
) -> str:
    """Write sparsity.json, .png and .md to `folder`; what stands above the mark in the page is kept. Returns the page's path."""
    results = {number: read_json(out / f"compare-E{number}" / "report.json")["contracts"] for number in experts}
    rates = read_json(out / "rates.json")["arms"]
    losses: dict[str, Json] = {}
    for number, result in results.items():
        losses |= {"active": result["arms"]["dense"], twins[number]: result["arms"]["total"]}
    check, page = interpolation_check(losses), folder / "sparsity.md"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "sparsity.json",
        {
            "schema_version": 1,
            "command": command,
            "rates": rates,
            "interpolation": check,
            "advised": advised,
            "by_experts": results,
        },
    )
    plot(results, losses, folder / "sparsity.png")
    before = page.read_text(encoding="utf-8").split(MARK)[0].rstrip() if page.exists() else "# Does sparsity pay?"
    seeds = len(next(iter(results.values()))["seeds"])
    tried = sorted({rate for entry in rates.values() for rate in entry["grid"]})
    lines = [
        before,
        "",
        MARK,
        "",
        f"`{command}`: {seeds} seeds; learning rates chosen for each arm from {', '.join(f'{rate:g}' for rate in tried)} "
        "in runs of a quarter of the steps with the first seed, and at full length where two of those ended close "
        f"({', '.join(name for name, entry in rates.items() if 'tried_at_full_length' in entry) or 'nowhere'}). Intervals are 95 % "
        "t intervals of differences paired by seed.",
        "",
        "![loss against size, and gain against the number of experts](sparsity.png)",
        "",
        "### What was trained",
        "",
        *arm_table(results, losses, rates),
        "",
        "### Verdicts",
        "",
        "Gain of the sparse model in bits per byte. † beyond the dense models, extrapolated.",
        "",
        *contract_table(results),
        "",
        "The power law through the smallest and the largest dense model misses the middle one by "
        f"{check['mean']:+.4f}{_ends(check)} bits per byte (above 0: it makes dense look worse than it is).",
        "",
        "### Speed",
        "",
        *speed_table(results),
    ]
    parts = decomposition(results)
    lines += ["", "### Capacity and routing", "", *parts] if parts else []
    lines += ["", "### Doing what the doctor says", "", *advice(advised)] if advised else []
    write_text(page, "\n".join(lines).rstrip() + "\n")
    return str(page)
