"""A sparse run against its dense twin at one moment: the forecast from past runs, the bet on a promise, or the gain alone.

What the trainer says at an evaluation (`moe/train/watch.py`) and what `moe forecast run` says of a folder is made here.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.analysis import bets
from moe.analysis.curves import read_curves
from moe.analysis.forecast_run import Learnt, gains_so_far, learn, look, require_reach, require_twin, subject_of
from moe.analysis.past_runs import COMPARE, comparison_pairs, routing_kind
from moe.analysis.rows import read_json
from moe.config.load import load
from moe.config.schema import Forecast, Run
from moe.errors import UserError

Json = dict[str, Any]
Kind = tuple[float | None, float | None]
NOTHING = {
    "forecast": None, "low": None, "high": None, "gain_at_anchor": None, "threshold": None, "looks": [], "alarm": None,
    "form": None,
    "scale": None, "past_runs": 0, "beyond_past_sizes": False, "promise": None, "bound": None, "fresh_rows": 0,
    "mean_gain": None, "wealth": None, "clipped": 0, "promise_alarm": None,
}  # fmt: skip


def learn_for(run: Run, given: Forecast, *, loss: str = "loss_validation", kind: Kind = (None, None)) -> Learnt | None:
    """What the past runs of `given.past` teach about a sparse run, or None without a file.

    Of the file, runs of the same top-k and share of sparse layers are used, or of `kind`. Raises DataError where they do not
    suffice.
    """
    if not given.past:
        return None
    own = routing_kind(run)
    top_k, frequency = (own[i] if kind[i] is None else kind[i] for i in (0, 1))
    assert top_k is not None and frequency is not None
    curves = read_curves(Path(given.past), loss=loss, top_k=top_k, routing_frequency=frequency)
    return learn(
        curves,
        subject_of(run),
        anchor=given.anchor,
        confidence=given.confidence,
        false_alarm_rate=each_rate(given),
    )


def each_rate(given: Forecast) -> float:
    """The false-alarm rate of each of the tests that are asked for: together they keep the whole one."""
    return given.false_alarm_rate / (2 if given.past and given.promise else 1)


def watch(run: Run, given: Forecast, learnt: Learnt | None, sparse: Path, dense: Path, until: float = math.inf) -> Json:
    """The gain of an unfinished or finished run up to the step `until`, with what follows from past runs and fresh rows.

    Raises UserError where the twin does not fit or is not there yet, or either run is not far enough.
    """
    require_twin(run, sparse, dense)
    subject = subject_of(run)
    progress_S, gain_S = gains_so_far(sparse, dense, subject.steps, until)
    result = {
        "schema_version": 1,
        "unit": "nats per token",
        "run": sparse.name,
        "active_parameters": subject.size,
        "experts": subject.experts,
        "progress": float(progress_S[-1]),
        "anchor": given.anchor,
        "gain_now": float(gain_S[-1]),
        "confidence": given.confidence,
        "false_alarm_rate": given.false_alarm_rate,
        **NOTHING,
    }
    if learnt is not None:
        require_reach(learnt, progress_S)
        result |= look(learnt, subject, progress_S, gain_S)
    if given.promise:
        span, rate = (given.anchor * subject.steps, until), each_rate(given)
        result |= bets.bet(sparse, dense, span, promise=given.promise, bound=given.bound, false_alarm_rate=rate)
    return result


def forecast_folder(
    folder: Path, dense: Path | None, given: Forecast, *, loss: str = "loss_validation", kind: Kind = (None, None)
) -> Json:
    """The watch over one run, or over every pair of a comparison (`runs`, and `skipped` with the reasons).

    What is not given (dense twin, past, promise) is taken from the run's own settings. Raises UserError.
    """
    if not (folder / COMPARE).exists():
        return _one(folder, dense, given, loss, kind)
    if dense is not None:
        raise UserError(f"{folder} is a comparison, which knows its dense twins: leave --dense out, or name one run.")
    runs, skipped = [], []
    for sparse, twin in comparison_pairs(folder):
        try:
            runs.append(_one(sparse, twin, given, loss, kind))
        except UserError as error:
            skipped.append(f"{sparse.name}: {error}")
    if not runs:
        raise UserError(f"no pair of {folder} can be forecast. {' '.join(skipped)}")
    return {"schema_version": 1, "unit": "nats per token", "runs": runs, "skipped": skipped}


def _one(sparse: Path, dense: Path | None, given: Forecast, loss: str, kind: Kind) -> Json:
    run = load(read_json(sparse / "run.json", {"run": (dict,)})["run"])
    if run.model.moe is None:
        raise UserError(f"{sparse} must be a sparse run and {dense} a dense one: exchange or correct the folders.")
    own = run.forecast
    twin = dense if dense is not None else Path(own.dense) if own.dense else None
    given = replace(given, past=given.past or own.past, promise=given.promise or own.promise)
    if twin is None:
        raise UserError(f"{sparse} does not know its dense twin: name its folder with --dense.")
    if not given.past and not given.promise:
        raise UserError(f"{sparse}: a forecast needs past runs (--past CSV, moe forecast collect) or a --promise.")
    return watch(run, given, learn_for(run, given, loss=loss, kind=kind), sparse, twin)


# --------------------------------------------------------------------------------------------------------------- words


def line(result: Json) -> str:
    """One line, as the trainer prints it."""
    parts = []
    if result["forecast"] is not None:
        parts.append(
            f"final gain {result['forecast']:.4f} [{result['low']:.4f}, {result['high']:.4f}] nats at share "
            f"{result['progress']:.3f}; {_alarm(result)}"
        )
    if result["promise"] is not None:
        parts.append(bets.describe(result))
    if not parts:
        parts.append(
            f"gain {result['gain_now']:+.4f} nats at share {result['progress']:.3f}; neither past runs nor a promise"
        )
    return f"forecast: {'; '.join(parts)}"


def _alarm(result: Json) -> str:
    if result["threshold"] is None:
        return "no alarm possible: too few past runs for its rate"
    return "no alarm" if result["alarm"] is None else f"ALARM since share {result['alarm']:.3f}"


def describe_folder(result: Json) -> str:
    """A run, or the runs of a comparison, in words."""
    if "runs" not in result:
        return describe(result)
    parts = [f"{run['run']}: {describe(run)}" for run in result["runs"]]
    return "\n".join([*parts, *(f"left out: {reason}" for reason in result["skipped"])])


def describe(result: Json) -> str:
    """The forecast in words."""
    where = f" (at {result['anchor']:.1%}: {result['gain_at_anchor']:+.4f})" if result["forecast"] is not None else ""
    lines = [f"at {result['progress']:.1%} of training the gain is {result['gain_now']:+.4f} nats per token{where}"]
    if result["forecast"] is not None:
        lines.append(
            f"final gain {result['forecast']:.4f} [{result['low']:.4f}, {result['high']:.4f}], {result['confidence']:.0%} interval "
            f"from {result['past_runs']} past runs"
        )
        lines += _remarks(result)
    if result["promise"] is not None:
        lines.append(bets.describe(result))
    return "\n".join(lines)


def _remarks(result: Json) -> list[str]:
    rate, lines = result["false_alarm_rate"], []
    if result["form"] != "plain":
        lines.append("the past runs had another schedule: their curves were translated to this run's")
    if result["beyond_past_sizes"]:
        lines.append("this size lies beyond all past ones: the interval rests on how well they predicted one another")
    if result["threshold"] is None:
        lines.append(f"no alarm: too few past runs for a rate of {rate:.1%} per run")
    elif result["alarm"] is None:
        lines.append(f"no alarm in {len(result['looks'])} looks ({rate:.0%} false alarms per run)")
    else:
        lines.append(
            f"ALARM at {result['alarm']:.1%}: the gain has fallen behind (false in {rate:.0%} of healthy runs)"
        )
    return lines
