"""The drills' confusion matrix, rates and delays as markdown, and their place in docs/doctor.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from moe.analysis.thresholds import THRESHOLDS

if TYPE_CHECKING:
    from .run import Outcome

BEGIN, END = "<!-- drills: begin (scripts/drills --write docs/doctor.md) -->", "<!-- drills: end -->"
THRESHOLD_MARKS = ("<!-- thresholds: begin -->", "<!-- thresholds: end -->")
LEAST_NAMED, MOST_FALSE = 0.8, 0.1
"""What is asked for: the injected cause first in 80 % of the faulty runs, at most 2 of 20 healthy runs alarmed."""


def write_tables(outcomes: Sequence[Outcome], path: Path | None) -> tuple[str, bool]:
    """The report, and whether the judged runs meet what is asked for; replaces the section of `path` if one is given."""
    groups = {
        "seed 0, on which thresholds were set": [o for o in outcomes if o.seed == 0],
        "seeds 1 and 2": [o for o in outcomes if o.seed in (1, 2)],
        "the size never used for tuning": [o for o in outcomes if o.size == "held-out"],
    }
    lines = ["| runs | cause named first | healthy runs alarmed |", "| --- | --- | --- |"]
    passed = True
    for name, group in groups.items():
        sick, well = [o for o in group if o.expected], [o for o in group if not o.expected]
        right = sum(named_first(o) for o in sick)
        false = sum(alarmed(o) for o in well)
        lines.append(f"| {name} | {rate(right, len(sick))} | {rate(false, len(well))} |")
        if not name.startswith("seed 0") and group:
            passed &= right >= LEAST_NAMED * len(sick) and false <= MOST_FALSE * len(well)
    text = "\n".join([*lines, "", *matrix([o for o in outcomes if o.seed != 0])])
    if path is not None:
        page = replaced(path.read_text(), BEGIN, END, text)
        path.write_text(replaced(page, *THRESHOLD_MARKS, threshold_table()) if THRESHOLD_MARKS[0] in page else page)
    return text, passed


def replaced(page: str, begin: str, end: str, text: str) -> str:
    """A page with other text between two marks."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def threshold_table() -> str:
    """moe/analysis/thresholds.py as markdown."""
    rows = [f"| `{name}` | {t.value:g} | {t.meaning} | {t.source} |" for name, t in THRESHOLDS.items()]
    return "\n".join(["| name | value | of what | source |", "| --- | --- | --- | --- |", *rows])


def named_first(outcome: Outcome) -> bool:
    """Whether the injected cause is the first of the final diagnosis."""
    return outcome.named[:1] == [outcome.expected]


def alarmed(outcome: Outcome) -> bool:
    """Whether a healthy run was alarmed, while it trained or at the end."""
    return bool(outcome.named or outcome.alarms)


def rate(count: int, total: int) -> str:
    """'20 of 24'."""
    return f"{count} of {total}"


def matrix(outcomes: Sequence[Outcome]) -> list[str]:
    """Judged runs by what was injected and what was named first, with delays from the fault to its alarm in steps."""
    lines = ["| injected | should be named | named first in the judged runs | median delay to the alarm (steps) |"]
    lines.append("| --- | --- | --- | --- |")
    for case in dict.fromkeys(o.case for o in outcomes):
        group = [o for o in outcomes if o.case == case]
        first = [(o.named or ["nothing"])[0] for o in group]
        counts = ", ".join(f"{name} {first.count(name)}" for name in sorted(set(first), key=lambda n: -first.count(n)))
        delays = [o.delay for o in group if o.delay is not None]
        early = sorted({f"alarm {cause} at step {step}" for o in group if not o.expected for step, cause in o.alarms})
        delay = f"{median(delays):g} ({len(delays)} of {len(group)})" if delays else "; ".join(early) or "–"
        lines.append(f"| {case} | {group[0].expected or 'nothing'} | {counts} | {delay} |")
    return lines
