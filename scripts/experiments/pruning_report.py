"""The page, figure and numbers of scripts/experiments/pruning, from its points.jsonl and nothing else.

A gain is the control's bits per byte minus the way's, paired by seed: above 0 the way is better than random experts.
"""

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pruning_tickets import table as ticket_table

from moe.analysis.paired import Interval, t_interval
from moe.analysis.plots import BLUE, GREY, STYLE, VERMILLION
from moe.files import write_json, write_text

Rows = list[dict[str, Any]]
ORDER = ("reap", "mean_norm", "weighted_norm", "frequency", "random", "merge", "cluster")
NAMES = {
    "merge": "merge (M-SMoE)",
    "cluster": "merge (HC-SMoE)",
    "mean_norm": "mean norm",
    "weighted_norm": "weighted norm",
}


def by_seed(rows: Rows, way: str, keep: float, steps: int) -> dict[int, float]:
    """Bits per byte of each seed, the mean over draws where there are several."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if (row["way"], row["keep"], row["steps"]) == (way, keep, steps):
            found[row["seed"]].append(row["bits_per_byte"])
    return {seed: float(np.mean(values)) for seed, values in sorted(found.items())}


def gain(rows: Rows, way: str, keep: float, steps: int, seeds: int | None = None) -> Interval | None:
    """random - way in bits per byte over the seeds (the first `seeds`), with a 95 % t interval."""
    mine, control = by_seed(rows, way, keep, steps), by_seed(rows, "random", keep, steps)
    common = [seed for seed in mine if seed in control and (seeds is None or seed < seeds)]
    return t_interval([control[seed] - mine[seed] for seed in common]) if common else None


def shown(interval: Interval | None) -> str:
    """A mean with its interval."""
    if interval is None:
        return ""
    if interval.low is None:
        return f"{interval.mean:+.3f}"
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def header(*columns: str) -> tuple[str, str]:
    """The first two lines of a table."""
    return f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)


def beaten(rows: Rows, way: str, keep: float) -> str:
    """How many of the random draws lose to the way, over the seeds."""
    mine = by_seed(rows, way, keep, 0)
    draws = [r for r in rows if (r["way"], r["keep"], r["steps"]) == ("random", keep, 0)]
    return f"{sum(r['bits_per_byte'] > mine[r['seed']] for r in draws)} of {len(draws)}"


def one_shot_tables(rows: Rows) -> list[str]:
    """A table for each share of experts that stays."""
    lines = []
    whole = np.mean(list(by_seed(rows, "whole", 1.0, 0).values()))
    for keep in (0.75, 0.5, 0.25):
        lines += [
            f"### {round(100 * (1 - keep))} % of the experts taken out, no further training",
            "",
            *header(
                "way",
                "bits per byte, mean of the seeds",
                "above the whole",
                "better than random by, all seeds",
                "by, first three seeds",
                "random draws beaten",
            ),
        ]
        means = {way: float(np.mean(list(by_seed(rows, way, keep, 0).values()))) for way in ORDER}
        for way in sorted(ORDER, key=lambda way: means[way]):
            others = (
                ("", "", "")
                if way == "random"
                else (
                    shown(gain(rows, way, keep, 0)),
                    shown(gain(rows, way, keep, 0, 3)),
                    beaten(rows, way, keep),
                )
            )
            lines.append(
                f"| {NAMES.get(way, way)} | {means[way]:.3f} | {means[way] - whole:+.3f} | {' | '.join(others)} |"
            )
        lines.append("")
    return lines


def recovered_table(rows: Rows, steps: int) -> list[str]:
    """What further training leaves of the loss."""
    whole, control = by_seed(rows, "whole", 1.0, 0), by_seed(rows, "whole", 1.0, steps)
    lines = [
        f"### After {steps} steps of further training",
        "",
        f"The control is the whole model after the same {steps} steps: {np.mean(list(control.values())):.3f} bits per byte "
        f"(before them {np.mean([whole[s] for s in control]):.3f}).",
        "",
        *header(
            "experts kept",
            "way",
            "bits per byte",
            "above the control",
            "better than random by",
            "before training, above the whole",
        ),
    ]
    for keep in (0.875, 0.75, 0.5, 0.25):
        found = {way: by_seed(rows, way, keep, steps) for way in ORDER}
        for way, values in sorted(
            ((w, v) for w, v in found.items() if v), key=lambda item: np.mean(list(item[1].values()))
        ):
            above = t_interval([value - control[seed] for seed, value in values.items()])
            before = by_seed(rows, way, keep, 0)
            lost = f"{np.mean([before[s] - whole[s] for s in values]):+.3f}" if before else ""
            versus = "" if way == "random" else shown(gain(rows, way, keep, steps))
            lines.append(
                f"| {keep:.1%} | {NAMES.get(way, way)} | {np.mean(list(values.values())):.3f} | {shown(above)} | {versus} "
                f"| {lost} |"
            )
    return [*lines, ""]


def sizes(rows: Rows) -> Rows:
    """Mean over seeds of every measured export, and how far it is above the whole model's bfloat16 export of the same seed."""
    groups: dict[tuple[str, float, int], Rows] = defaultdict(list)
    for row in rows:
        if row["way"].endswith(" size"):
            groups[row["way"], row["keep"], row["draw"]].append(row)
    whole = {row["seed"]: row["bits_per_byte"] for row in groups["whole size", 1.0, 16]}
    return [
        {
            "keep": keep,
            "bits": bits,
            "way": way.removesuffix(" size"),
            "bytes": int(np.mean([r["bytes"] for r in found])),
            "active": found[0]["active"],
            "bits_per_byte": float(np.mean([r["bits_per_byte"] for r in found])),
            "above": t_interval([r["bits_per_byte"] / whole[r["seed"]] - 1 for r in found]),
            "seeds": len(found),
        }
        for (way, keep, bits), found in sorted(groups.items(), key=lambda item: (-item[0][1], -item[0][2]))
    ]


def percent(interval: Interval) -> str:
    """A relative mean with its interval."""
    spread = "" if interval.low is None else f" ({interval.low:+.2%} to {interval.high:+.2%})"
    return f"{interval.mean:+.2%}{spread}"


def size_table(table: Rows) -> list[str]:
    """Loss against bytes, with the undominated rows marked."""
    lines = [
        f"### Loss against bytes and active parameters, {min(row['seeds'] for row in table)} seeds",
        "",
        *header(
            "experts kept",
            "stored as",
            "bytes of weights",
            "active parameters",
            "bits per byte",
            "above the whole in bfloat16 (95 %)",
            "on the front",
        ),
    ]
    for row in table:
        front = not any(o["bytes"] < row["bytes"] and o["bits_per_byte"] <= row["bits_per_byte"] for o in table)
        lines.append(
            f"| {row['keep']:.1%} | {stored_as(row)} | {row['bytes']:,} | {row['active']:,} | {row['bits_per_byte']:.4f} "
            f"| {percent(row['above'])} | {'yes' if front else ''} |"
        )
    within = [row for row in table if row["above"].mean <= 0.01]
    if within:
        least, most = min(within, key=lambda row: row["bytes"]), max(table, key=lambda row: row["bytes"])
        lines += [
            "",
            f"The smallest model whose bits per byte are within 1 % of the whole one's keeps {least['keep']:.1%} of the experts in "
            f"{stored_as(least)}: {least['bytes']:,} bytes, {most['bytes'] / least['bytes']:.2f} times less than bfloat16; "
            f"it is {percent(least['above'])} above it.",
        ]
    return [*lines, ""]


def stored_as(row: dict[str, Any]) -> str:
    """The type of an export's matrices."""
    return "bfloat16" if row["bits"] == 16 else f"int{row['bits']}"


def plot(rows: Rows, table: Rows, steps: int, path: Path) -> None:
    """Loss against the share of experts kept, against bytes, and against active parameters."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 4.2), layout="constrained")
        left, right, active = figure.subplots(1, 3)
        whole = float(np.mean(list(by_seed(rows, "whole", 1.0, 0).values())))
        styles = {
            "reap": (BLUE, "o-"),
            "mean_norm": (BLUE, "s--"),
            "random": (GREY, "x-"),
            "cluster": (VERMILLION, "^--"),
        }
        for way, (color, marker) in styles.items():
            points = [(1.0, whole)] + [
                (k, float(np.mean(list(by_seed(rows, way, k, 0).values())))) for k in (0.75, 0.5, 0.25)
            ]
            left.plot(*zip(*points, strict=True), marker, color=color, label=NAMES.get(way, way))
        trained = [(k, by_seed(rows, "reap" if k < 1 else "whole", k, steps)) for k in (1.0, 0.875, 0.75, 0.5, 0.25)]
        points = [(k, float(np.mean(list(found.values())))) for k, found in trained if found]
        left.plot(*zip(*points, strict=True), "o-", color=VERMILLION, label=f"REAP, {steps} steps on")
        left.set(xlabel="share of the experts that stays", ylabel="bits per byte")
        left.invert_xaxis()
        left.legend()
        for bits, color in ((16, GREY), (8, BLUE), (4, VERMILLION)):
            points = [(row["bytes"] / 1000, row["bits_per_byte"]) for row in table if row["bits"] == bits]
            if points:
                right.plot(
                    *zip(*points, strict=True), "o-", color=color, label="bfloat16" if bits == 16 else f"int{bits}"
                )
        tickets = [
            r for r in rows if r["way"] == "lottery ticket" and r["draw"] == 1 and r["bits_per_byte"] < 1.4 * whole
        ]
        if tickets:
            keeps = sorted({row["keep"] for row in tickets}, reverse=True)
            groups = [[row for row in tickets if row["keep"] == keep] for keep in keeps]
            points = [
                (np.mean([r["bytes"] for r in g]) / 1000, np.mean([r["bits_per_byte"] for r in g])) for g in groups
            ]
            right.plot(*zip(*points, strict=True), "s--", color="black", label="lottery tickets in bfloat16")
        right.set(xlabel="kilobytes of weights", ylabel="bits per byte", xscale="log")
        in_bfloat16 = [row for row in table if row["bits"] == 16]
        for row in in_bfloat16:
            active.annotate(
                f"{row['keep']:.1%}", (row["active"] / 1000, row["bits_per_byte"]), (6, 0), textcoords="offset points"
            )
        active.plot(
            [row["active"] / 1000 for row in in_bfloat16],
            [row["bits_per_byte"] for row in in_bfloat16],
            "o-",
            color=GREY,
        )
        active.set(xlabel="thousands of active parameters", ylabel="bits per byte", title="experts kept, bfloat16")
        active.margins(x=0.25)
        active.xaxis.set_major_locator(MaxNLocator(4))
        if table:
            right.legend(loc="lower left")
        figure.savefig(path, dpi=110)


def write_report(rows: Rows, command: str, folder: Path) -> str:
    """Write pruning.json, pruning.png and the tables of pruning.md, below its hand-written text; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = max(row["steps"] for row in rows)
    table = sizes(rows)
    plain = [{**row, "above": asdict(row["above"])} for row in table]
    write_json(folder / "pruning.json", {"schema_version": 1, "command": command, "points": rows, "sizes": plain})
    plot(rows, table, steps, folder / "pruning.png")
    page = folder / "pruning.md"
    mark = "<!-- what follows is written by scripts/experiments/pruning -->"
    before = page.read_text(encoding="utf-8").split(mark)[0].rstrip() if page.exists() else "# Pruning experts"
    seeds = len({row["seed"] for row in rows})
    lines = [
        before,
        "",
        mark,
        "",
        f"`{command}`: {seeds} seeds ({len(by_seed(rows, 'whole', 1.0, steps))} of them trained on). Intervals are 95 % t "
        "intervals of the paired differences over seeds.",
        "",
        "![loss against experts kept, and against bytes](pruning.png)",
        "",
        *one_shot_tables(rows),
        *recovered_table(rows, steps),
        *(size_table(table) if table else []),
        *ticket_table(rows),
    ]
    write_text(page, "\n".join(lines).rstrip() + "\n")
    return str(page)
