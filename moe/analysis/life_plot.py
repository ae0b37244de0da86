"""The figure of the Game of Life laboratory: six panels, every share with its Wilson interval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe.analysis.life_results import (
    AGAIN,
    MAGNITUDE,
    RANDOM,
    Results,
    grown,
    layers,
    median_updates,
    pruned,
    solved,
    without_error,
)
from moe.analysis.plots import BLUE, GREEN, STYLE, VERMILLION
from moe.analysis.shares import Share

SERIES = ((BLUE, "o", "-"), (VERMILLION, "s", "--"), (GREEN, "^", "-."))


def plot(results: Results, path: Path) -> None:
    """Write the figure; a panel whose part was not run stays away."""
    panels = [lambda axes: _width(axes, results)] if results.growing else []
    first = results.pruning[:1]
    panels += [lambda axes, part=part: _pruning(axes, part, legend=part in first) for part in results.pruning]
    panels += [lambda axes, part=part: _flips(axes, part) for part in results.flips]
    panels += [lambda axes, part=part: _densities(axes, part) for part in results.densities]
    panels += [lambda axes: _experts(axes, results.experts)] if results.experts else []
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * columns, 3.5 * rows), layout="constrained")
        for number, panel in enumerate(panels, 1):
            panel(figure.add_subplot(rows, columns, number))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def _line(axes: Axes, x: Sequence[float], shares: Sequence[Share], label: str, series: int) -> None:
    colour, marker, dash = SERIES[series % len(SERIES)]
    below = [max(0.0, share.value - share.low) for share in shares]
    above = [max(0.0, share.high - share.value) for share in shares]
    middle = [share.value for share in shares]
    style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 5}
    axes.errorbar(x, middle, yerr=(below, above), label=label, capsize=3, elinewidth=1, linewidth=1.6, **style)


def _share_axis(axes: Axes, title: str, xlabel: str) -> None:
    axes.set_ylim(-0.04, 1.04)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("share that is exact")


def _width(axes: Axes, results: Results) -> None:
    for series, steps in enumerate(sorted({n for n, _ in results.growing})):
        found = {m: grown(part) for (n, m), part in sorted(results.growing.items()) if n == steps}
        words = "1 step" if steps == 1 else f"{steps} steps"
        _line(axes, list(found), list(found.values()), f"{words}, exact", series)
        if steps > 1:
            loose = [without_error(results.growing[steps, m]) for m in found]
            _line(axes, [m * 1.04 for m in found], loose, f"{words}, right on boards", 2)
    widths = sorted({m for _, m in results.growing})
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(m) for m in widths])
    axes.minorticks_off()
    _share_axis(axes, "Learning the rule needs spare width", "m, filters over the number that suffices")
    axes.legend(loc="upper left", fontsize=8)


def _pruning(axes: Axes, part: dict[str, Any], *, legend: bool) -> None:
    total = part["parameters"]
    for series, (arm, label) in enumerate(
        ((MAGNITUDE, "largest kept, rewound"), (AGAIN, "same mask, new values"), (RANDOM, "random mask"))
    ):
        found = pruned(part, arm)
        # a little apart, so that intervals of different arms do not cover each other
        x = [kept / total * 1.025 ** (series - 1) for kept in found]
        _line(axes, x, list(found.values()), label, series)
    ticks = [1.0, 0.5, 0.2, 0.1]
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.minorticks_off()
    _share_axis(axes, f"Winners of L(1, {part['settings']['width']}), pruned", f"parameters left of {total}")
    if legend:
        axes.legend(loc="upper right", fontsize=8)


def _flips(axes: Axes, part: dict[str, Any]) -> None:
    found = {row["flipped"]: solved(row) for row in part["rows"]}
    _line(axes, range(len(found)), list(found.values()), "", 0)
    axes.set_xticks(range(len(found)), [str(count) for count in found])
    _share_axis(axes, "L(1, 1), trained from the solution", "signs flipped, of 25 parameters")


def _densities(axes: Axes, part: dict[str, Any]) -> None:
    found = {row["density"]: solved(row) for row in part["rows"]}
    _line(axes, list(found), list(found.values()), "", 0)
    axes.set_xticks(list(found), [str(density) for density in found])
    _share_axis(
        axes, f"L(1, {part['settings']['width']}): what boards teach", "share of living cells on training boards"
    )


def _experts(axes: Axes, parts: list[dict[str, Any]]) -> None:
    for place, part in enumerate(parts):
        share = layers(part)
        sparse = part["settings"]["moe"]["num_experts"] > 1
        colour, marker = (BLUE, "o") if sparse else (VERMILLION, "s")
        bounds = [[max(0.0, share.value - share.low)], [max(0.0, share.high - share.value)]]
        axes.errorbar([share.value], [place], xerr=bounds, color=colour, marker=marker, capsize=3, markersize=5)
        updates = median_updates(part)
        note = f"{updates:.0f}" if updates is not None else "–"
        axes.annotate(note, (1.03, place), xycoords=("axes fraction", "data"), fontsize=8, va="center", color=colour)
    axes.annotate("updates", (1.03, -0.85), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    axes.set_yticks(range(len(parts)), [part["settings"]["label"] for part in parts], fontsize=8)
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.set_xlim(-0.04, 1.04)
    axes.set_title("Expert layers", loc="left", fontsize=10)
    axes.set_xlabel("share that is exact")
