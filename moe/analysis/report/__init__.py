"""The report of runs: report.json, PNG plots and one self-contained interactive page, from the logged files alone.

In reading order: `reading` (runs, finished or not), `words` (sentences), `curves`, `loads` and `forecasts` (what the page draws),
`pictures` (PNG plots), `comparison` and `runs` (the contents of report.json), `blocks`, `tables` and `page` (HTML), `build`.
"""

from moe.analysis.report.build import build_report

__all__ = ["build_report"]
