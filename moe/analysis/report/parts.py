"""Parts that reports of runs and of comparisons share: charts, what differs in the settings, the ledger, the doctor's findings."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from moe.analysis.doctor import diagnose
from moe.analysis.history import read_history
from moe.analysis.ledger import of_arms
from moe.analysis.ledger_prices import describe_equal, describe_next, equal_loss, next_nats
from moe.analysis.report.budgets import budgets_of
from moe.analysis.report.curves import curves
from moe.analysis.report.forecasts import forecast_chart
from moe.analysis.report.gains import paired_gains
from moe.analysis.report.loads import heat_maps
from moe.analysis.report.reading import Arm
from moe.analysis.rows import Json, RunRows
from moe.analysis.summaries import flatten
from moe.errors import UserError

NOT_SETTINGS = ("name", "seed", "logging.promise")
"""Of a run's config, what differs between seeds or by the comparison's own doing."""


def charts(arms: Sequence[Arm], pairs: Sequence[tuple[Arm, Arm]], jobs: int = 1, past: Path | None = None) -> Json:
    """Everything that the page draws: curves, paired gains of the first over the second of each pair, forecasts, heat maps."""
    budgets = budgets_of(arms, jobs)
    gains = [paired_gains(of, over, budgets) for of, over in pairs]
    sparse = [(arm.label(run), run) for arm in arms if arm.sparse for run in arm.runs]
    forecasts = [forecast_chart(label, run, _twin(run, arms), past) for label, run in sparse]
    return {
        **curves(arms, budgets),
        "gains": [one for one in gains if one is not None],
        "forecasts": [one for one in forecasts if one is not None],
        "heat": heat_maps(sparse),
    }


def _twin(run: RunRows, arms: Sequence[Arm]) -> RunRows | None:
    """The first dense run of the same seed and length, one beside it rather than another."""
    dense = [other for arm in arms if not arm.sparse for other in arm.runs]
    alike = [other for other in dense if _seed_and_steps(other) == _seed_and_steps(run)]
    return next((r for r in alike if r.path.parent == run.path.parent), next(iter(alike), None))


def _seed_and_steps(run: RunRows) -> tuple[int, int]:
    return run.config["seed"], run.config["train"]["steps"]


def config_table(arms: Sequence[Arm]) -> list[Json]:
    """Settings that are not alike in all arms: {field, values}, the values in the order of the arms, null where there is none."""
    settings = [dict(flatten(arm.runs[0].config)) for arm in arms]
    names = dict.fromkeys(name for one in settings for name in one if name not in NOT_SETTINGS)
    rows = [{"field": name, "values": [one.get(name) for one in settings]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"][1:])]


def ledger_table(folders: Mapping[str, Sequence[Path]]) -> Json | None:
    """What the arms have used, and all of them; None where one has no ledger, or one that cannot be read."""
    try:
        return of_arms(folders)
    except UserError:
        return None


def prices(arms: Sequence[Arm], pairs: Sequence[tuple[Arm, Arm]]) -> list[str]:
    """What the next hundredth of a nat costs each arm, and what dense ones cost at the sparse loss; of the first seed."""
    said = []
    for arm in arms:
        with suppress(UserError):  # no ledger, or too few evaluations for a slope
            said.append(f"{arm.runs[0].path.name}: {describe_next(next_nats(arm.runs[0].path))}.")
    for sparse, dense in pairs:
        twin = next((run for run in dense.runs if run.config["seed"] == sparse.runs[0].config["seed"]), None)
        if sparse.sparse and not dense.sparse and twin is not None:
            with suppress(UserError):
                words = describe_equal(equal_loss(sparse.runs[0].path, twin.path))
                said.append(f"{sparse.runs[0].path.name} against {twin.path.name}: {words}.")
    return said


def doctors(arms: Sequence[Arm]) -> Json:
    """What the doctor says of the sparse runs: `findings` (what several share: once), `healthy` runs, `not_examined`."""
    said: Json = {"findings": [], "healthy": [], "early": [], "not_examined": []}
    for label, run in [(arm.label(run), run) for arm in arms if arm.sparse for run in arm.runs]:
        try:
            history = read_history(run.path)
        except UserError as error:
            said["not_examined"].append({"run": label, "why": str(error)})
            continue
        found = [finding.as_json() for finding in diagnose(history)]
        if not found:
            said["early" if history.step <= history.grace else "healthy"].append(label)
        for finding in found:
            alike = next((f for f in said["findings"] if _told(f) == _told(finding)), None)
            if alike is None:
                said["findings"].append(finding | {"runs": [label]})
            else:
                alike["runs"].append(label)
    return said


def _told(finding: Json) -> tuple[str, ...]:
    """What a reader is told of a finding."""
    return tuple(str(finding[name]) for name in ("cause", "sure", "what", "why", "change", "consequence_of"))
