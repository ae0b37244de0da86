"""`moe report`: the files of a report, for a comparison, a run, or any runs."""

import json
from collections.abc import Sequence
from pathlib import Path

from moe.analysis.report.comparison import comparison_report
from moe.analysis.report.page import render
from moe.analysis.report.runs import run_report, runs_report
from moe.analysis.rows import Json
from moe.analysis.summaries import finite
from moe.errors import UserError
from moe.files import write_text


def build_report(folders: Path | Sequence[Path], out: Path | None = None, past: Path | None = None) -> Path:
    """Write plots/, report.json and report.html; returns the path of report.html.

    One folder of a comparison or a run is reported where it lies, unless `out` is given; several are runs, or comparisons whose
    runs are taken, and `out` is by default the folder `report` beside the first. `past` is a file of past runs (moe forecast
    collect) for the forecasts that no run logged. Raises UserError for files that are missing or
    malformed, and for comparisons that are not finished.
    """
    given = [folders] if isinstance(folders, Path) else list(dict.fromkeys(folders))
    if not given:
        raise UserError("a report needs the folder of a run or a comparison: moe report runs/quickstart-compare")
    if len(given) == 1:
        report = _one(given[0], out or given[0], past)
        out = out or given[0]
    else:
        runs = [run for folder in given for run in _runs_of(folder)]
        out = out or given[0].parent / "report"
        _require_free(out, given)
        report = runs_report(runs, out, past)
    report = finite({"schema_version": 1, **report})
    write_text(out / "report.json", as_text(report))
    write_text(out / "report.html", render(report))
    return out / "report.html"


def _one(folder: Path, out: Path, past: Path | None) -> Json:
    if (folder / "compare.json").exists():
        return comparison_report(folder, out, past)
    if (folder / "run.json").exists():
        return run_report(folder, out)
    raise UserError(
        f"{folder} holds neither compare.json nor run.json: give the output directory of `moe compare` or `moe train`."
    )


def _runs_of(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, or those of a comparison's runs."""
    if (folder / "run.json").exists():
        return [folder]
    runs = sorted(path.parent for path in folder.glob("*/run.json"))
    if not runs:
        raise UserError(f"{folder} holds no run.json, nor does a folder in it: give folders of runs or comparisons.")
    return runs


def _require_free(out: Path, given: Sequence[Path]) -> None:
    """Whether the report of several runs would overwrite that of one."""
    if (out / "run.json").exists() or (out / "compare.json").exists():
        raise UserError(f"{out} has a report of its own: choose another folder with --out.")


def as_text(report: Json) -> str:
    """report.json: indented for readers, but what charts draw in one line, for it is long."""
    rest = {name: value for name, value in report.items() if name != "charts"}
    lines = json.dumps(rest, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    drawn = json.dumps(report["charts"], ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f'{lines},\n "charts": {drawn}\n}}\n'
