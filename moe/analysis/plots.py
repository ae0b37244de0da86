"""Plots of runs as PNG files: labelled axes with units, a colour-blind-safe palette, no display needed.

Colours are those of Okabe and Ito (2008, "Color Universal Design"); every line also differs by dash or label.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from moe.analysis.paired import Interval
from moe.analysis.rows import Json, RunRows
from moe.analysis.summaries import by_layer

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#595959",
)
ARM_STYLE: dict[Any, Any] = {"sparse": (BLUE, "-"), "dense": (VERMILLION, "--")}
LAYER_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#000000")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 3)))
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
MAX_COLUMNS = 300
"""Most time columns of a heat map; more steps are averaged."""


@dataclass(frozen=True)
class Curve:
    """One run's validation curve: evaluations during training, and the final one on more rows."""

    x: np.ndarray
    y: np.ndarray
    final_x: float
    final_y: float


@contextmanager
def _figure(path: Path, width: float, height: float):
    """A figure of width × height inches that is saved to `path` on leaving."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _common(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs of x and of y, evaluation by evaluation, as far as every run has got."""
    n = min(len(curve.x) for curve in curves)
    return np.mean([c.x[:n] for c in curves], axis=0), np.mean([c.y[:n] for c in curves], axis=0)


def _draw_arm(axes: Axes, name: str, curves: Sequence[Curve], colour: str, dash) -> None:
    mean_label = name if len(curves) == 1 else f"{name}, mean of {len(curves)} seeds"
    if len(curves) > 1:
        for curve in curves:
            axes.plot(curve.x, curve.y, color=colour, linestyle=dash, linewidth=0.7, alpha=0.45)
    x, y = _common(curves)
    axes.plot(x, y, color=colour, linestyle=dash, linewidth=2, label=mean_label)
    marker = {"sparse": "o", "dense": "s"}.get(name, "o")
    axes.scatter(
        [c.final_x for c in curves],
        [c.final_y for c in curves],
        s=26,
        marker=marker,
        facecolor="white",
        edgecolor=colour,
        linewidth=1.3,
        zorder=5,
        label=f"{name}, final evaluation",
    )


def _frame(axes: Axes, curves: Sequence[Curve]) -> bool:
    """Set the y range to what follows the first quarter of training; says whether that cuts anything off."""
    late = [y for c in curves for x, y in zip(c.x, c.y, strict=True) if x >= 0.25 * c.final_x]
    values = [value for value in [c.final_y for c in curves] + late if np.isfinite(value)]
    if not values:
        return False
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    return any(np.max(c.y, initial=-np.inf, where=np.isfinite(c.y)) > high + margin for c in curves)


def plot_curves(arms: dict[str, list[Curve]], xlabel: str, path: Path) -> bool:
    """Validation bits per byte of each arm against x; returns whether early evaluations lie outside the frame."""
    with _figure(path, 7.2, 4.2) as figure:
        axes = figure.subplots()
        for name, curves in arms.items():
            _draw_arm(axes, name, curves, *ARM_STYLE.get(name, (BLUE, "-")))
        cut = _frame(axes, [curve for curves in arms.values() for curve in curves])
        axes.set_xlim(left=0)
        axes.set(xlabel=xlabel, ylabel="Validation loss (bits per byte)")
        axes.legend(loc="upper right")
    return cut


def plot_gain(arms: dict[str, list[Curve]], interval: Interval, seeds: Sequence[int], path: Path) -> None:
    """Paired gain (dense minus sparse) during training, and beside it each seed's final gain with the interval."""
    with _figure(path, 7.2, 3.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1.25])
        pairs = list(zip(arms["sparse"], arms["dense"], strict=True))
        n = min(min(len(s.x), len(d.x)) for s, d in pairs)
        gains = [d.y[:n] - s.y[:n] for s, d in pairs]
        for (sparse, _), gain in zip(pairs, gains, strict=True):
            left.plot(sparse.x[:n], gain, color=GREY, linewidth=0.8, alpha=0.6)
        if n:
            left.plot(np.mean([s.x[:n] for s, _ in pairs], axis=0), np.mean(gains, axis=0), color=BLUE, linewidth=2)
        left.set(
            xlabel="Training tokens (millions)",
            ylabel="Gain: dense − sparse\n(bits per byte, above 0: sparse is better)",
        )
        left.set_title("Evaluations during training: each seed, mean", fontsize=10, loc="left")
        left.set_xlim(left=0)
        low, high = interval.low, interval.high
        if low is not None and high is not None:
            errors = [[interval.mean - low], [high - interval.mean]]
            right.errorbar([0], [interval.mean], yerr=errors, color=BLUE, marker="D", capsize=6, linewidth=2)
        right.scatter(np.arange(1, len(seeds) + 1), interval.values, facecolor="white", edgecolor=GREY, linewidth=1.5)
        labels = ["mean,\n95 %" if low is not None else "", *(str(seed) for seed in seeds)]
        right.set_xticks(range(len(labels)), labels)
        right.set_xlim(-0.6, len(seeds) + 0.5)
        right.grid(axis="x", visible=False)
        right.set(xlabel="Seed")
        right.set_title("Final evaluation", fontsize=10, loc="left")
        for axes in (left, right):
            axes.axhline(0, color="black", linewidth=1)


def load_ratio(rows: Sequence[Json]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and load over its ideal 1/E [n, E] of one layer; long runs are averaged to MAX_COLUMNS columns."""
    steps = np.array([row["step"] for row in rows], dtype=float)
    counts = np.array([row["counts"] for row in rows], dtype=float)
    ratio = counts / np.maximum(counts.sum(1, keepdims=True), 1) * counts.shape[1]
    if len(steps) > MAX_COLUMNS:
        groups = np.array_split(np.arange(len(steps)), MAX_COLUMNS)
        steps = np.array([steps[group].mean() for group in groups])
        ratio = np.stack([ratio[group].mean(0) for group in groups])
    return steps, ratio


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders of the columns around `centres`."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[centres[0] - (middle[0] - centres[0])], middle, [centres[-1] + (centres[-1] - middle[-1])]])


def _centred_at_one(top: float) -> tuple[Normalize, ListedColormap]:
    """A linear scale from 0 to `top` whose diverging colours are white at 1."""
    values = np.linspace(0, top, 512)
    return Normalize(0, top), ListedColormap(
        matplotlib.colormaps["PuOr_r"](np.where(values < 1, values / 2, 0.5 + (values - 1) / (top - 1) / 2))
    )


def plot_routing(runs: Sequence[RunRows], path: Path) -> None:
    """Load of every expert over time: one panel per expert layer (and per run, if there are few layers)."""
    layers = runs[0].layers
    side_by_side = len(layers) <= 8 and len(runs) <= 4
    shown = list(runs) if side_by_side else [runs[0]]
    columns = len(shown) if side_by_side else min(4, len(layers))
    panels = [(run, layer) for layer in layers for run in shown]
    lines = -(-len(panels) // columns)
    loads = [load_ratio(by_layer(run)[layer]) for run, layer in panels if layer in by_layer(run)]
    top = max(2.0, float(np.percentile(np.concatenate([ratio.ravel() for _, ratio in loads]), 99.5)))
    norm, colours = _centred_at_one(top)
    with _figure(path, 8.2, min(max(2.4, 0.9 + 1.45 * lines), 22)) as figure:
        grid = np.atleast_2d(figure.subplots(lines, columns, sharex=True, squeeze=False))
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (run, layer), (steps, ratio) in zip(grid.flat, panels, loads, strict=False):
            axes.pcolormesh(
                _edges(steps), np.arange(ratio.shape[1] + 1) - 0.5, ratio.T, norm=norm, cmap=colours, rasterized=True
            )
            axes.set_title(f"Layer {layer}" + (f", seed {run.config['seed']}" if len(shown) > 1 else ""), fontsize=9)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(False)
        figure.supxlabel("Optimizer step", fontsize=10)
        figure.supylabel("Expert", fontsize=10)
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=grid, shrink=min(1, 3 / lines), extend="max")
        bar.set_label("Load relative to\nits ideal share 1/E")


def plot_balance(runs: Sequence[RunRows], path: Path) -> None:
    """Load entropy, and MaxVio beside its noise floor, over steps: each layer's mean over runs, each run thin."""
    layers = runs[0].layers
    few = len(layers) <= len(LAYER_COLOURS)
    scale = matplotlib.colormaps["cividis"].resampled(max(len(layers), 2))
    with _figure(path, 7.2, 5.4) as figure:
        entropy, violation = figure.subplots(2, 1, sharex=True)
        for index, layer in enumerate(layers):
            colour = LAYER_COLOURS[index] if few else scale(index)
            dash = DASHES[index] if few else "-"
            series = [by_layer(run).get(layer, []) for run in runs]
            n = min(len(rows) for rows in series)
            steps = [row["step"] for row in series[0][:n]]
            for axes, name in ((entropy, "load_entropy"), (violation, "max_vio")):
                values = np.array([[row[name] for row in rows[:n]] for rows in series], dtype=float)
                if len(runs) > 1:
                    axes.plot(steps, values.T, color=colour, linestyle=dash, linewidth=0.5, alpha=0.35)
                axes.plot(steps, values.mean(0), color=colour, linestyle=dash, linewidth=1.8, label=f"layer {layer}")
        rows = by_layer(runs[0])[layers[0]]
        steps, floor = [row["step"] for row in rows], [row["max_vio_floor"] for row in rows]
        label = "noise floor of a perfectly balanced router"
        violation.plot(steps, floor, color="black", linestyle=(0, (1, 1.5)), linewidth=1.5, label=label)
        entropy.set_ylabel("Load entropy\n(share of ln E; 1 = balanced)")
        entropy.set_ylim(top=1.01)
        violation.set(xlabel="Optimizer step", ylabel="MaxVio\n(largest load / ideal − 1)")
        violation.set_ylim(bottom=0)
        violation.xaxis.set_major_locator(MaxNLocator(integer=True))
        if few:
            handles, labels = violation.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=4)
        else:
            violation.legend(handles=[violation.lines[-1]])
            colours = ListedColormap([scale(i) for i in range(len(layers))])
            bar = figure.colorbar(ScalarMappable(cmap=colours), ax=[entropy, violation], label="Layer")
            bar.set_ticks([0.0, 1.0], labels=[str(layers[0]), str(layers[-1])])


def plot_training(run: RunRows, path: Path) -> None:
    """Training loss of one run against tokens: every step thin, and its running mean."""
    tokens = np.array([row["tokens"] for row in run.metrics], dtype=float) / 1e6
    loss = np.array([np.nan if row["loss"] is None else row["loss"] for row in run.metrics], dtype=float)
    width = max(1, len(loss) // 50)
    with _figure(path, 7.2, 3.8) as figure:
        axes = figure.subplots()
        axes.plot(tokens, loss, color=SKY, linewidth=0.7, label="every step")
        if width > 1 and np.isfinite(loss).all():
            smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
            middle = tokens[(width - 1) // 2 :][: len(smooth)]
            axes.plot(middle, smooth, color=BLUE, linewidth=2, label=f"mean of {width} steps")
        axes.set_xlim(left=0)
        axes.set(xlabel="Training tokens (millions)", ylabel="Training loss (nats per token)")
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.legend(loc="upper right")
