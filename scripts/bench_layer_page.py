"""What bench_layer.py measured: its rows, and the tables that it renews in docs/benchmarks.md."""

import datetime
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bench_common import Ratio

NAME = "bench_layer"
PLAIN, COMPILED = "ours, backend torch", "dense, backend cpu"
"""Without the compiled kernels, and the dense layer with them; not there where there is no compiler."""
_SHOWN = ("ours", PLAIN, COMPILED, "products", "transformers grouped_mm", "transformers eager")
"""Columns, after the dense layer's, which is 1."""


@dataclass(frozen=True)
class Row:
    """One contender at one shape."""

    shape: tuple[int, ...]
    """(T, D, F, E, K)."""
    dtype: str
    threads: int
    tokens: str
    contender: str
    share: Ratio
    """Its speed as a share of the dense layer's."""
    ours: Ratio
    """Our speed as a multiple of its own."""
    milliseconds: float
    dropped: float = 0.0
    """Share of the routed rows that it left out."""


def print_row(row: Row) -> None:
    """One line for people."""
    label = ", ".join(map(str, row.shape))
    print(
        f"  {label:22} {row.contender:24} {row.share!s:20} of dense speed · ours is {row.ours!s:20} times as fast · "
        f"{row.milliseconds:.1f} ms" + (f" · drops {row.dropped:.1%} of the rows" if row.dropped else ""),
        flush=True,
    )


def figures(rows: list[Row]) -> dict[str, Ratio]:
    """By name, what a second run is held against: each contender's share of the dense layer's speed, and ours over their best."""
    found = {}
    for (dtype, threads, tokens, shape), group in _groups(
        rows, lambda row: (row.dtype, row.threads, row.tokens, row.shape)
    ):
        case = f"{dtype}, {threads} threads, {tokens} tokens, {shape}"
        found |= {f"{row.contender}, {case}": row.share for row in group if row.contender != "dense"}
        found[f"ours / their best, {case}"] = best_peer(group).ours
    return found


def best_peer(rows: list[Row]) -> Row:
    """The fastest of transformers' implementations at one shape."""
    return max((row for row in rows if row.contender.startswith("transformers")), key=lambda row: row.share.middle)


def geometric_mean(rows: list[Row]) -> float:
    """Of our speed over the best peer's, over shapes and types."""
    groups = _groups(rows, lambda row: (row.dtype, row.shape))
    return math.exp(statistics.fmean(math.log(best_peer(group).ours.middle) for _, group in groups))


def _groups(rows: list[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    return [(name, list(group)) for name, group in groupby(rows, key)]


def table(rows: list[Row]) -> list[str]:
    """A line per type and shape, of one number of threads and one kind of tokens."""
    timed = {row.contender for row in rows}
    shown = [name for name in _SHOWN if name in timed]
    lines = [
        f"| type | T, D, F, E, K | {' | '.join(shown)} | ours / their best |",
        "| --- | --- |" + " --- |" * (len(shown) + 1),
    ]
    for (dtype, shape), group in _groups(rows, lambda row: (row.dtype, row.shape)):
        by_name = {row.contender: row.share for row in group}
        shares = [by_name[name] for name in shown]
        cells = [dtype, ", ".join(map(str, shape)), *map(str, shares), str(best_peer(group).ours)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def peers_table(rows: list[Row]) -> list[str]:
    """A line per type and shape of what other projects' layers reached; empty where none was timed."""
    names = list(dict.fromkeys(row.contender for row in rows if row.contender not in (*_SHOWN, "dense")))
    if not names:
        return []
    columns = [column for name in names for column in (name, f"ours / {name}")]
    lines = [f"| type | T, D, F, E, K | ours | {' | '.join(columns)} |", "| --- |" + " --- |" * (2 + len(columns))]
    for (dtype, shape), group in _groups(rows, lambda row: (row.dtype, row.shape)):
        by_name = {row.contender: row for row in group}
        cells = [dtype, ", ".join(map(str, shape)), str(by_name["ours"].share)]
        for name in names:
            row = by_name.get(name)
            drops = f", drops {row.dropped:.1%}" if row and row.dropped else ""
            cells += [f"{row.share}{drops}", str(row.ours)] if row else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def tables(rows: list[Row], facts: dict[str, str]) -> str:
    """All tables, each with what it was measured on and the geometric mean."""
    lines = [
        f"{datetime.date.today().isoformat()}. " + " · ".join(f"{key} {value}" for key, value in facts.items()),
        "",
    ]
    for (threads, tokens), group in _groups(rows, lambda row: (row.threads, row.tokens)):
        plural = "s" if threads > 1 else ""
        lines += [
            f"### {threads} thread{plural}, {'the same tokens' if tokens == 'same' else 'new tokens'} in every round",
            "",
        ]
        lines += [
            *table(group),
            "",
            f"Ours over transformers' best, geometric mean of the table: {geometric_mean(group):.2f}.",
            "",
            *peers_table(group),
        ]
    same = [row for row in rows if row.tokens == "same"]
    if len({row.threads for row in same}) > 1:
        means = [geometric_mean(group) for _, group in _groups(same, lambda row: row.threads)]
        mean = math.exp(statistics.fmean(math.log(value) for value in means))
        lines += [f"Over both tables with the same tokens: {mean:.2f}.", ""]
    return "\n".join(lines)
