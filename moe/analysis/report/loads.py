"""Routing for the page: the load of every expert in every layer over time, and how balanced the layers are."""

import math
from collections.abc import Sequence

import numpy as np

from moe.analysis.report.curves import brief
from moe.analysis.rows import Json, RunRows
from moe.analysis.summaries import by_layer

MOST_CELLS = 200_000
"""Most numbers of a page's heat maps, layers times experts times moments; beyond, moments are averaged."""
MOST_MOMENTS = 200
BALANCE = {
    "load_entropy": "Load entropy (share of ln E)",
    "max_vio": "MaxVio",
    "drop_rate": "Share of rows dropped",
    "router_entropy": "Entropy of a token's scores (share of ln E)",
}


def heat_maps(runs: Sequence[tuple[str, RunRows]]) -> list[Json]:
    """Of each (label, run) with experts: load in per cent of the ideal, [moment][layer][expert], and balance, [layer][moment].

    Layers with fewer experts than others end in nulls.
    """
    sparse = [(label, run) for label, run in runs if run.routing]
    cells = sum(len(run.layers) * _experts(run) for _, run in sparse)
    moments = max(2, min(MOST_MOMENTS, MOST_CELLS // max(cells, 1)))
    return [_heat_map(label, run, moments) for label, run in sparse]


def _experts(run: RunRows) -> int:
    return max(len(row["counts"]) for row in run.routing)


def _heat_map(label: str, run: RunRows, most: int) -> Json:
    layers = by_layer(run)
    steps = sorted(set.intersection(*({row["step"] for row in rows} for rows in layers.values())))
    groups = np.array_split(np.array(steps, int), min(most, len(steps))) if steps else []
    experts = _experts(run)
    percent = np.full((len(groups), len(layers), experts), -1, int)
    balance: dict[str, list[list[float | None]]] = {name: [] for name in (*BALANCE, "max_vio_floor")}
    for i, rows in enumerate(layers.values()):
        at = {row["step"]: row for row in rows}
        counts_ME = [np.mean([_share(at[int(step)]["counts"]) for step in group], axis=0) for group in groups]
        for moment, ratio_E in enumerate(counts_ME):
            percent[moment, i, : ratio_E.size] = np.rint(100 * ratio_E)
        for name, lines in balance.items():
            values = [[at[int(step)].get(name, math.nan) for step in group] for group in groups]
            lines.append(brief([np.mean(np.array(group, float)) for group in values]))
    measures = [{"name": n, "title": title, "lines": balance[n]} for n, title in BALANCE.items() if _logged(balance[n])]
    return {
        "run": label,
        "layers": list(layers),
        "experts": experts,
        "steps": [round(float(group.mean())) for group in groups],
        "averaged": len(groups) < len(steps),
        "percent": [[[int(v) if v >= 0 else None for v in row] for row in moment] for moment in percent],
        "top": int(max(200, np.percentile(percent[percent >= 0], 99.5))) if percent.size else 200,
        "balance": measures,
        "floor": balance["max_vio_floor"][0] if balance["max_vio_floor"] else None,
    }


def _logged(lines: Sequence[Sequence[float | None]]) -> bool:
    """Whether any moment of any layer has the quantity."""
    return any(value is not None for line in lines for value in line)


def _share(counts: Sequence[float]) -> np.ndarray:
    """Load over its ideal share."""
    counts_E = np.asarray(counts, float)
    return counts_E / max(counts_E.sum(), 1) * counts_E.size
