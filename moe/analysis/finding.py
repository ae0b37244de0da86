"""A finding of the doctor, and when a condition counts as lasting."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from moe.analysis.rows import Json

Sure = Literal["certain", "likely", "possible"]
MOSTLY = 0.75
"""Share of the points that must be bad for a condition to last; single points of noise do not end it."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    cause: str
    layers: tuple[int, ...]
    """Indices of the blocks; empty for the whole run."""
    since: int
    """First step of the condition that still holds."""
    sure: Sure
    what: str
    """What is wrong, in words and numbers."""
    why: str
    """What it probably comes from."""
    change: str
    """What to change."""
    consequence_of: tuple[str, ...] = ()
    """Causes found beside it that explain it."""

    def as_json(self) -> dict[str, Any]:
        """Its fields as JSON."""
        return asdict(self)


def lasting(points: Sequence[tuple[int, bool]], least: int) -> int | None:
    """The first step of a condition that holds now, or None: bad in most of the last `least` points, and in the last one."""
    if len(points) < least or not points[-1][1] or sum(bad for _, bad in points[-least:]) < MOSTLY * least:
        return None
    since, bad_so_far = points[-1][0], 0
    for count, (step, bad) in enumerate(reversed(points), 1):
        bad_so_far += bad
        if bad_so_far < MOSTLY * count:
            break
        if bad:
            since = step
    return since


def how_sure(points: Sequence[tuple[int, bool]], excess: float) -> Sure:
    """From how many points were bad and by which factor the limit is exceeded now."""
    bad = sum(flag for _, flag in points)
    if bad >= 6 and excess >= 1.5:
        return "certain"
    return "likely" if bad >= 3 else "possible"


@dataclass(frozen=True)
class LayerTrouble:
    """One layer that meets a condition now."""

    layer: int
    since: int
    value: float
    """The judged quantity: its median over the last points."""
    sure: Sure
    row: Json
    """The layer's last row."""


def troubled(
    rows_by_layer: dict[int, list[Json]],
    value_of: Callable[[Json], float | None],
    limit: float,
    *,
    above: bool = True,
    least: int = 3,
    since: dict[int, list[Json]] | None = None,
) -> list[LayerTrouble]:
    """The layers where a quantity is beyond a limit, and stays there; rows without the quantity are passed over.

    `since` has further rows by layer, before the judged ones, in which the condition may have begun.
    """

    def judged(rows: Sequence[Json]) -> list[tuple[Json, float]]:
        return [(row, value) for row in rows if (value := value_of(row)) is not None]

    def flags(pairs: Sequence[tuple[Json, float]]) -> list[tuple[int, bool]]:
        return [(row["step"], value > limit if above else value < limit) for row, value in pairs]

    found = []
    for layer, rows in sorted(rows_by_layer.items()):
        pairs = judged(rows)
        points = flags(pairs)
        start = lasting(points, least)
        if start is None:
            continue
        start = lasting(flags(judged(since[layer])), least) or start if since is not None else start
        value = median(value for _, value in pairs[-least:])
        excess = (value / limit if above else limit / max(value, 1e-12)) if limit else 2.0
        found.append(LayerTrouble(layer, start, value, how_sure(points, excess), pairs[-1][0]))
    return found


def name_layers(layers: Sequence[int], total: int) -> str:
    """'layer 3', 'layers 3 and 7', 'all 12 expert layers'."""
    if len(layers) == total and total > 1:
        return f"all {total} expert layers"
    names = [str(layer) for layer in layers]
    return f"layer {names[0]}" if len(names) == 1 else f"layers {', '.join(names[:-1])} and {names[-1]}"


def of_layers(
    cause: str, found: Sequence[LayerTrouble], *, what: str, why: str, change: str, sure: Sure | None = None
) -> Finding:
    """The finding about layers that meet a condition: since the first of them did, as sure as the best established."""
    order: tuple[Sure, ...] = ("certain", "likely", "possible")
    best: Sure = next(level for level in order if any(one.sure == level for one in found))
    layers, since = tuple(one.layer for one in found), min(one.since for one in found)
    return Finding(cause=cause, layers=layers, since=since, sure=sure or best, what=what, why=why, change=change)
