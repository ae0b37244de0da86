"""HTML blocks: escaped text, tables, and figures that say which value of report.json they show.

A figure is a `data` element whose `data-from` is the value's JSON pointer (RFC 6901) in report.json and whose `value` is the
value itself, so that whoever doubts a rounded number can look it up, and a test can check every one.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from moe.analysis.rows import Json

DASH = "–"
Key = str | int


@dataclass(frozen=True)
class Markup:
    """HTML that is escaped already."""

    html: str


Cell = str | Markup
Form = Callable[[Any], str]


def text(value: Cell) -> str:
    """Escaped text whose percentages and [intervals] do not break over lines."""
    if isinstance(value, Markup):
        return value.html
    kept = re.sub(r"(?<=\d) %|(?<=[,;]) (?=[^\[\]]*\])", lambda match: match[0].replace(" ", "\u00a0"), str(value))
    return escape(kept)


def at(report: Json, *path: Key) -> Any:
    """The value at a path of keys."""
    value: Any = report
    for key in path:
        value = value[key]
    return value


def figure(report: Json, form: Form | str, *path: Key) -> Markup:
    """The value at a path, in words (a function, or a format of numbers); a dash for null."""
    value = at(report, *path)
    if value is None:
        return Markup(DASH)
    shown = form(value) if callable(form) else format(value, form).replace("%", " %").replace("-", "−")
    pointer = "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)
    return Markup(f'<data value="{escape(json.dumps(value))}" data-from="{escape(pointer)}">{text(shown)}</data>')


def figures(report: Json, form: Form | str, *path: Key) -> Markup:
    """A list of values, with commas."""
    return joined(", ", [figure(report, form, *path, i) for i in range(len(at(report, *path)))])


def joined(between: str, parts: Iterable[Cell]) -> Markup:
    """Several parts as one."""
    return Markup(escape(between).join(text(part) for part in parts))


def quantity(unit: str = "", digits: int = 3) -> Form:
    """A form of amounts with a metric prefix: 1540000 -> '1.54 M'; below one only with a unit: 0.0021 s -> '2.1 ms'."""

    def form(value: float) -> str:
        for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= factor * 0.9995:
                return f"{value / factor:#.{digits}g}".rstrip(".") + f" {prefix}{unit}"
        for factor, prefix in ((1.0, ""), (1e-3, "m"), (1e-6, "µ")):
            if unit and value and abs(value) >= factor * 0.9995:
                return f"{value / factor:.{digits}g} {prefix}{unit}"
        return f"{value:.{digits}g} {unit}".rstrip()

    return form


def table(header: Sequence[Cell], rows: Iterable[Sequence[Cell]], *, caption: str = "", kind: str = "") -> str:
    """An HTML table; the first column is a row header."""
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


def paragraph(content: Cell, kind: str = "") -> str:
    """A paragraph."""
    return f'<p class="{escape(kind)}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>"


def bullets(items: Iterable[Cell], kind: str = "") -> str:
    """A list."""
    return f"<ul{f' class={kind}' if kind else ''}>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>"


def switch(name: str, legend: str, options: Sequence[tuple[str, str, str | None]]) -> str:
    """Radio buttons (value, label, why it cannot be chosen or None); the first that can is chosen."""
    first = next((value for value, _, missing in options if missing is None), None)
    buttons = "".join(
        f'<label{"" if missing is None else f""" title="{escape(missing)}" """}>'
        f'<input type="radio" name="{escape(name)}" value="{escape(value)}"{" checked" if value == first else ""}'
        f"{'' if missing is None else ' disabled'}>{text(label)}</label>"
        for value, label, missing in options
    )
    return f'<fieldset class="switch"><legend>{text(legend)}</legend>{buttons}</fieldset>'


def chart(name: str, caption: str, controls: str = "", label: str = "") -> str:
    """A place that the page's script draws into, with its controls above and its caption below."""
    return (
        f'<figure>{controls}<div class="chart" id="chart-{escape(name)}" role="img" aria-label="{escape(label or caption)}"></div>'
        f'<figcaption>{text(caption)} <span class="note" id="note-{escape(name)}"></span></figcaption></figure>'
    )
