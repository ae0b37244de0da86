"""The roofline plot of a profile: FLOP/s over FLOPs per byte, both logarithmic, one marker per kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from moe.analysis.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILLION

MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)


@dataclass(frozen=True)
class Point:
    """One kernel."""

    name: str
    intensity: float
    """FLOPs per byte."""
    predicted: float
    """FLOP/s."""
    measured: float | None = None
    """FLOP/s."""


@dataclass(frozen=True)
class Roof:
    """One chip."""

    name: str
    flops: float
    """FLOP/s that large products reach."""
    bandwidth: float
    """Bytes/s that large copies reach."""
    peak: float | None
    """The vendor's FLOP/s."""


def plot_roofline(roof: Roof, points: Sequence[Point], title: str, path: Path) -> None:
    """Write the plot as the file type that `path` ends in (png, svg, pdf); points without FLOPs are left out."""
    points = [point for point in points if point.intensity > 0]
    ridge = roof.flops / roof.bandwidth
    low = min([ridge / 3, *(point.intensity / 1.5 for point in points)])
    high = max([ridge * 6, *(point.intensity * 1.5 for point in points)])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        _draw_roof(axes, roof, low, high)
        for i, point in enumerate(points):
            _draw_point(axes, point, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        measured = any(point.measured for point in points)
        axes.set(xscale="log", yscale="log", xlim=(low, high), title=title)
        axes.set_xlabel("Useful FLOPs per byte moved to or from memory")
        axes.set_ylabel(
            "Useful TFLOP/s: predicted hollow, measured filled" if measured else "Useful TFLOP/s, predicted"
        )
        rates = [
            low * roof.bandwidth,
            *(rate for point in points for rate in (point.predicted, point.measured) if rate),
        ]
        axes.set_ylim(min(rates) / 1.3e12, (roof.peak or roof.flops) * 1.3 / 1e12)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(NullLocator())
        axes.legend(loc="lower right", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Software": None} if path.suffix == ".png" else None)


def _draw_roof(axes: Axes, roof: Roof, low: float, high: float) -> None:
    x = np.array([low, roof.flops / roof.bandwidth, high])
    axes.plot(x, np.minimum(roof.flops, x * roof.bandwidth) / 1e12, color="black", linewidth=1.6)
    label: dict[str, Any] = {"color": GREY, "fontsize": 9, "va": "bottom", "ha": "right"}
    axes.text(high / 1.03, roof.flops / 1e12 * 1.02, f"large products, {roof.flops / 1e12:.0f} TFLOP/s", **label)
    if roof.peak:
        axes.axhline(roof.peak / 1e12, color=GREY, linewidth=1, linestyle=":")
        axes.text(high / 1.03, roof.peak / 1e12 * 1.02, f"vendor's peak, {roof.peak / 1e12:.0f} TFLOP/s", **label)
    start = low * 1.15
    axes.text(
        start * 1.12,
        start * roof.bandwidth / 1e12,
        f"{roof.bandwidth / 1e12:.1f} TB/s",
        **{**label, "ha": "left", "va": "top"},
    )


def _draw_point(axes: Axes, point: Point, colour: str, marker: str) -> None:
    label = f"{point.name}, {point.predicted / 1e12:.0f} TFLOP/s"
    if point.measured:
        label += f", measured {point.measured / 1e12:.0f}"
        axes.scatter(point.intensity, point.measured / 1e12, s=60, marker=marker, color=colour, zorder=4)
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.8}
    axes.scatter(point.intensity, point.predicted / 1e12, s=60, marker=marker, zorder=5, label=label, **style)
