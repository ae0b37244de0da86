"""The gain of a sparse run over its dense twin while it trains: forecast at every evaluation, said, logged, and an alarm once.

Also keeps the losses of single fresh validation rows, which a promise is tested on; `moe/analysis/gain_watch.py` does the judging.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.analysis.bets import FILE as FRESH
from moe.analysis.finding import Finding
from moe.config.schema import Run
from moe.errors import UserError
from moe.files import write_text
from moe.metrics import JsonLines
from moe.train.evaluate import EvaluationResult
from moe.train.runlog import RunLog

if TYPE_CHECKING:
    from moe.analysis.forecast_run import Learnt

FILE = "forecast.jsonl"
CAUSE = "gain_behind"


def require_forecast(run: Run) -> "Learnt | None":
    """What the past runs teach, before anything is begun; raises UserError where they do not suffice, or the twin is none."""
    dense = Path(run.forecast.dense)
    if run.model.moe is None or not (run.forecast.dense or run.forecast.past):
        return None
    # scipy comes with these, 100 MB that a run without a forecast does not need
    from moe.analysis.forecast_run import require_twin
    from moe.analysis.gain_watch import learn_for

    if run.forecast.dense and (dense / "run.json").exists():
        require_twin(run, Path("this run"), dense)
    return learn_for(run, run.forecast)


class GainWatch:
    """Looks at each evaluation of one run. Every rank has one, because all evaluate; rank 0 writes and says."""

    def __init__(self, run: Run, out: Path, log: RunLog, *, begin: int, validation_rows: int):
        self.run, self.out, self.log, self.validation_rows = run, out, log, validation_rows
        self.writes = log.ranks.first
        self.used = bool(run.forecast.dense) and run.model.moe is not None and self.writes
        self.learnt = require_forecast(run) if self.used else None
        self.said = ""
        self.alarmed: set[str] = set()
        if self.used and begin:
            self.alarmed = _forget(out / FILE, begin)

    def look(self, step: int, evaluate: Callable[[int, int, int], EvaluationResult]) -> None:
        """After the evaluation of `step`; `evaluate(step, rows, first row)` is called where fresh rows are to be looked at."""
        self._fresh(step, evaluate)
        if self.used and step >= self.run.forecast.anchor * self.run.train.steps:
            self._forecast(step)

    def _fresh(self, step: int, evaluate: Callable[[int, int, int], EvaluationResult]) -> None:
        """Losses of rows that no other evaluation looks at, from the end of the validation set towards its beginning."""
        rows, every = self.run.evaluation.fresh_rows, self.run.evaluation.every_steps
        if not rows:
            return
        turn = -(-step // every) if every else 1
        first = self.validation_rows - turn * rows
        if first < 0:
            self._say_once(
                f"no fresh rows are left at step {step}: all {self.validation_rows} validation rows were looked at"
            )
            return
        result = evaluate(step, rows, first)
        if self.writes:
            nats = (result.nats_row / result.tokens_row.clip(1)).tolist()
            self._write(FRESH, step=step, first=first, nats=nats)

    def _forecast(self, step: int) -> None:
        from moe.analysis.gain_watch import line, watch

        try:
            given = self.run.forecast
            result = watch(self.run, given, self.learnt, self.out, Path(given.dense), until=step)
        except (UserError, OSError) as error:  # another run's files must not end this one
            self._write(FILE, step=step, note=str(error), alarm=None, promise_alarm=None)
            self._say_once(f"no forecast at step {step}: {error}")
            return
        if result["progress"] < step / self.run.train.steps - 1e-9:
            behind = round(result["progress"] * self.run.train.steps)
            self._say_once(f"the dense twin has been evaluated up to step {behind} only; forecasts go as far")
        self._write(FILE, step=step, note="", **_row(result))
        self.log.console.say(line(result))
        steps = self.run.train.steps
        since = {
            "past runs": None if result["alarm"] is None else round(result["alarm"] * steps),
            "promise": result["promise_alarm"],
        }
        for against, when in since.items():
            if when is not None and against not in self.alarmed:
                self.alarmed.add(against)
                self.log.alarm(step, _finding(result, against, when))

    def _write(self, name: str, **row: Any) -> None:
        file = JsonLines(self.out / name, self.log.attempt)
        file.write(**row)
        file.close()

    def _say_once(self, words: str) -> None:
        """What holds for many evaluations is said at the first; words that differ in a step number only are the same."""
        kind = re.sub(r"[0-9.]+", "", words)
        if kind != self.said:
            self.said = kind
            self.log.console.say(f"forecast: {words}")


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """A line of forecast.jsonl: what the watch found, without its looks and what every line would repeat."""
    left_out = ("schema_version", "unit", "run", "looks", "progress", "gain_now")
    deviation = result["looks"][-1]["deviation"] if result["looks"] else None
    rest = {name: value for name, value in result.items() if name not in left_out}
    return {"share": result["progress"], "gain": result["gain_now"], "deviation": deviation, **rest}


def _finding(result: dict[str, Any], against: str, since: int) -> Finding:
    """The alarm as the doctor's findings are written."""
    if against == "past runs":
        what = f"the gain over the dense twin has fallen below what {result['past_runs']} healthy past runs allow"
        rate = result["false_alarm_rate"]
    else:
        mean, promise = result["mean_gain"], result["promise"]
        what = f"the mean gain of {result['fresh_rows']} fresh rows is {mean:.4f} nats, and {promise:g} was promised"
        rate = result["promise_false_alarm_rate"]
    return Finding(
        cause=CAUSE,
        layers=(),
        since=since,
        sure="likely",
        what=what,
        why=f"the run learns less from its experts than it should; {rate:.1%} of healthy runs are alarmed like this",
        change="stop and ask moe doctor, or go on knowing the odds",
    )


def _forget(path: Path, begin: int) -> set[str]:
    """Drop rows of steps that a resumed run does again; returns what had been alarmed before."""
    rows = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(text)
        except ValueError:
            continue  # what a killed process left of a line
        if row["step"] <= begin:
            rows.append(row)
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    names = {"alarm": "past runs", "promise_alarm": "promise"}
    return {said for field, said in names.items() if any(row.get(field) is not None for row in rows)}
