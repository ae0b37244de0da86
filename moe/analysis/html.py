"""report.json and its plots as one HTML file: no script, no network, readable on screen (light, dark) and on paper."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe.analysis.rows import Json

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #575757; --line: #c9c9c9; --paper: #ffffff; --card: #f4f4f2;
  --ahead: #0072B2; --behind: #D55E00; --undecided: #767676; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #b0b0ad; --line: #4c4c4a; --paper: #1d1d1c;
  --card: #292928; --ahead: #56B4E9; --behind: #E69F00; --undecided: #9a9a9a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 48rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.verdict { margin: 1.25rem 0; padding: .9rem 1.1rem; background: var(--card); border-left: 6px solid var(--undecided);
  font-size: 1.15rem; }
.verdict.ahead { border-color: var(--ahead); } .verdict.behind { border-color: var(--behind); }
.verdict p { margin: 0; max-width: none; } .verdict p + p { margin-top: .4rem; font-size: .95rem; color: var(--soft); }
.cautions { border: 1px solid var(--behind); padding: .2rem 1rem; } .cautions ul { padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } table.text td { white-space: normal; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
table.text th, table.text td { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } figure img { display: block; width: 100%; max-width: 52rem; height: auto; background: #fff;
  border: 1px solid var(--line); }
figcaption { margin-top: .4rem; max-width: 52rem; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .88em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .7rem 1rem; }
@media print { :root { --ink: #000; --soft: #333; --line: #999; --paper: #fff; --card: #fff; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } figure, table, .verdict { break-inside: avoid; }
  figure { margin: .6rem 0; } figure img { width: 125mm; } h2 { break-after: avoid; margin-top: 1.2rem; }
  .wide { overflow: visible; } }
"""
DASH = "–"


def text(value: Any) -> str:
    """Escaped text whose percentages and [intervals] do not break over lines."""
    kept = re.sub(r"(?<=\d) %|(?<=[,;]) (?=[^\[\]]*\])", lambda match: match[0].replace(" ", "\u00a0"), str(value))
    return escape(kept)


def quantity(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A count with a metric prefix: 1540000 -> '1.54 M'."""
    if value is None:
        return DASH
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:#.{digits}g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.{digits}g} {unit}".rstrip()


def signed(value: float, decimals: int = 3) -> str:
    """A number with a typographic sign."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def each(values: Iterable[float | None], form: str) -> str:
    """Several values of one cell, one per seed."""
    return ", ".join(DASH if value is None else format(value, form) for value in values)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "", kind: str = "") -> str:
    """An escaped HTML table; the first column is a row header."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{text(cell)}</th>' if index == 0 else f"<td>{text(cell)}</td>"
            for index, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    label = f"<caption>{text(caption)}</caption>" if caption else ""
    style = f' class="{escape(kind)}"' if kind else ""
    return f'<div class="wide"><table{style}>{label}{head}<tbody>\n{body}\n</tbody></table></div>'


def paragraph(content: str, kind: str = "") -> str:
    """An escaped paragraph."""
    return f'<p class="{escape(kind)}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>"


def figure(plot: Json, directory: Path) -> str:
    """A plot with its caption, the PNG inlined."""
    data = base64.b64encode((directory / plot["file"]).read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{escape(plot["title"])}" src="data:image/png;base64,{data}">'
        f"<figcaption><strong>{text(plot['title'])}.</strong> {text(plot['caption'])}</figcaption></figure>"
    )


def arms_table(report: Json) -> str:
    """The arms side by side, one row per quantity."""
    arms = report["arms"]
    shared = " (runs side by side)" if (report.get("jobs") or 1) > 1 else ""
    lines: list[tuple[str, list[str]]] = [
        ("Parameters, total", [quantity(arm["parameters_total"]) for arm in arms]),
        ("Parameters, active per token", [quantity(arm["parameters_active"]) for arm in arms]),
        ("Training FLOPs per token, planned", [quantity(arm["train_flops_per_token"], "FLOP", 4) for arm in arms]),
        ("Training FLOPs per token, measured", [quantity(arm["measured_flops_per_token"], "FLOP", 4) for arm in arms]),
        ("Training tokens per run", [quantity(arm["tokens"][0]) for arm in arms]),
        ("Final bits per byte, mean", [each([arm["mean_bits_per_byte"]], ".4f") for arm in arms]),
        ("Final bits per byte, by seed", [each(arm["final_bits_per_byte"], ".4f") for arm in arms]),
        (
            "Tokens per second, interleaved timing",
            [quantity(v) if (v := arm["tokens_per_second"]) else "not measured" for arm in arms],
        ),
        (f"Training seconds{shared}", [each(arm["seconds"], ".0f") for arm in arms]),
        (
            "Peak memory, largest",
            [quantity(max((m for m in arm["peak_memory_bytes"] if m), default=None), "B") for arm in arms],
        ),
    ]
    return table(["", *(arm["name"] for arm in arms)], [(label, *cells) for label, cells in lines])


def gain_table(report: Json) -> str:
    """Final bits per byte and gain of each seed, with the noise of the evaluation."""
    sparse, dense = report["arms"]
    noise = report["evaluation_noise"] or [None] * len(sparse["seeds"])
    rows: list[Sequence[Any]] = [
        (
            seed,
            f"{d:.4f}",
            f"{s:.4f}",
            signed(d - s, 4),
            DASH if n is None or n["half_width"] is None else f"± {n['half_width']:.4f}",
        )
        for seed, d, s, n in zip(
            sparse["seeds"], dense["final_bits_per_byte"], sparse["final_bits_per_byte"], noise, strict=True
        )
    ]
    header = ["Seed", "Dense (bits per byte)", "Sparse (bits per byte)", "Gain: dense − sparse", "Evaluation noise"]
    gain = report["gain"]
    means = [f"{arm['mean_bits_per_byte']:.4f}" for arm in (dense, sparse)]
    rows.append(("mean", *means, signed(gain["mean"], 4), ""))
    if gain["low"] is not None:
        ends = f"[{signed(gain['low'], 4)}, {signed(gain['high'], 4)}]"
        rows.append((f"{100 * gain['confidence']:g} % interval", "", "", ends, ""))
    return table(header, rows)


def health_table(health: Sequence[Json], seeds: int) -> str:
    """Routing health per expert layer: mean over seeds, with the range where there are several."""

    def cell(line: Json, name: str, form: str) -> str:
        if line.get(name) is None:
            return DASH
        mean, low, high = (format(value, form).replace("%", " %") for value in line[name])
        return mean if low == high == mean else f"{mean} ({low}–{high})"

    rows = [
        (
            line["layer"],
            cell(line, "load_entropy", ".3f"),
            f"{cell(line, 'effective_experts', '.1f')} of {line['experts']}",
            cell(line, "max_vio", ".2f"),
            cell(line, "max_vio_floor", ".2f"),
            cell(line, "dead_experts", ".1f"),
            cell(line, "drop_rate", ".1%"),
            cell(line, "router_entropy", ".2f"),
        )
        for line in health
    ]
    header = ["Layer", "Load entropy", "Effective experts", "MaxVio", "Noise floor", "Dead experts", "Dropped rows"]
    steps = health[0]["logged_steps"]
    caption = f"Mean over the last {steps} logged steps" + (
        f" and {seeds} seeds (lowest–highest seed)." if seeds > 1 else "."
    )
    return table([*header, "Router entropy"], rows, caption=caption)


def render(report: Json, directory: Path) -> str:
    """The whole page for a report.json value whose plots lie in `directory`."""
    verdict = report["verdict"]
    parts = [f"<h1>{escape(report['title'])}</h1>", paragraph(report["subtitle"], "soft")]
    notes = "".join(paragraph(note) for note in verdict["notes"])
    parts.append(f'<div class="verdict {escape(verdict["name"])}"><p>{text(verdict["sentence"])}</p>{notes}</div>')
    if report["cautions"]:
        items = "".join(f"<li>{text(caution)}</li>" for caution in report["cautions"])
        parts.append(f'<div class="cautions"><p><strong>Read with care</strong></p><ul>{items}</ul></div>')
    comparison = report["kind"] == "comparison"
    parts += ["<h2>The two arms</h2>" if comparison else "<h2>The run</h2>", arms_table(report)]
    if comparison:
        parts += ["<h2>Gain by seed</h2>", gain_table(report), *map(paragraph, report["gain"]["notes"])]
        parts += ["<h2>Speed</h2>", *map(paragraph, report["speed"])]
    plots = {
        group: [figure(p, directory) for p in report["plots"] if p["group"] == group] for group in ("loss", "routing")
    }
    parts += ["<h2>Loss</h2>", *plots["loss"]]
    if report["routing"]:
        parts += ["<h2>Routing</h2>", *map(paragraph, report["routing_notes"])]
        parts += [health_table(report["routing"], len(report["arms"][0]["seeds"])), *plots["routing"]]
    if comparison:
        parts.append("<h2>What differs between the arms</h2>")
        rows = [
            (d["field"], *(DASH if d[k] is None else d[k] for k in ("sparse", "dense"))) for d in report["differences"]
        ]
        parts.append(table(["Setting", "Sparse", "Dense"], rows, kind="text"))
        parts += map(paragraph, report["twin_notes"])
    parts.append("<h2>How it was run</h2>")
    if report["command"]:
        parts.append(f"<pre>{escape(report['command'])}</pre>")
    parts.append(table(["", ""], report["environment"], kind="text"))
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(report["title"])}</title>
<style>{CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""
