"""A recipe against its dense twins: train every arm for every seed through the trainer's own entry, time them, report.

The files of one directory: the runs as planned.py leaves them, compare.json, timing.json, report.json and report.html.
"""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moe.analysis.contract_report import describe
from moe.analysis.gain_watch import learn_for
from moe.analysis.promise import FILE as PROMISE
from moe.analysis.report import build_report
from moe.analysis.rows import read_json
from moe.config.load import load
from moe.config.schema import Run
from moe.errors import ConfigError, UserError
from moe.experiments.arms import arms_of, tuned, twin_record
from moe.experiments.planned import TIMING, TRAIN, Planned, find_rate, state_of, time_steps, train, watched
from moe.experiments.processes import cpu_count
from moe.experiments.promise import require_promise
from moe.files import write_json

CONTRACT = "equal active FLOPs per token"
Json = dict[str, Any]


def _plan(out: Path, base: str, run: Run, arm: str, seed: int, label: str = "") -> Planned:
    label = label or f"{arm}-seed{seed}"
    return Planned(out / label, replace(run, seed=seed, name=f"{base}-{arm}-seed{seed}"))


def _check_arguments(seeds: Sequence[int], jobs: int, lr_grid: Sequence[float], timing_rounds: int) -> None:
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"seeds must be different numbers from 0, at least one, found {list(seeds)}: e.g. --seeds 3.")
    if jobs < 1:
        raise UserError(f"jobs ({jobs}) must be at least 1: it is the number of runs that train side by side.")
    if any(not lr > 0 or not math.isfinite(lr) for lr in lr_grid) or len(set(lr_grid)) != len(lr_grid):
        raise UserError(f"learning rates to try must be different positive numbers, found {list(lr_grid)}.")
    if timing_rounds < 0:
        raise UserError(f"timing_rounds ({timing_rounds}) must be 0 (no timing) or more.")


def _command_line() -> str:
    """How this process was called, without the path to the program."""
    program = Path(sys.argv[0]).name
    return shlex.join(["moe" if program in ("__main__.py", "cli.py") else program, *sys.argv[1:]])


def _load(recipe: str, overrides: list[str], jobs: int, say: Callable[[str], None]) -> Run:
    """The sparse run, with a number of threads that suits `jobs` runs side by side where the recipe leaves it open."""
    notices: list[str] = []
    run = load(recipe, overrides, notices=notices)
    for notice in notices:
        say(notice)
    if run.model.moe is None:
        raise ConfigError(
            f"{recipe} has no expert layers (model.moe), so there is nothing to compare: name a sparse recipe."
        )
    threads = run.train.threads or max(1, cpu_count() // jobs)
    return replace(run, train=replace(run.train, threads=threads))


def _record(
    recipe: str, overrides: list[str], plans: dict[str, list[Planned]], arms: dict[str, Run], rest: Json
) -> Json:
    """What compare.json holds."""
    names = {arm: [planned.directory.name for planned in planned_runs] for arm, planned_runs in plans.items()}
    return {
        "schema_version": 1,
        "contract": CONTRACT,
        "recipe": recipe,
        "overrides": overrides,
        "command": _command_line(),
        "arms": {arm: names.pop(arm) for arm in ("sparse", "dense")},
        "more_arms": names,
        "twin": twin_record(arms["sparse"], arms["dense"]),
        **rest,
    }


def compare(
    recipe: str,
    *,
    overrides: list[str],
    seeds: int | list[int],
    out: Path,
    jobs: int,
    lr_grid: list[float],
    timing_rounds: int,
    console: Console,
    contracts: bool = False,
    decompose: bool = False,
    tune_each: bool = False,
    promise: Path | None = None,
    train_command: Sequence[str] = TRAIN,
    timing_command: Sequence[str] = TIMING,
) -> Path:
    """Compare a sparse recipe with its dense twin over paired seeds; returns the path of report.html.

    `seeds` is a count, from the recipe's own seed on, or a list. With `lr_grid`, the shared learning rate is the one at
    which the dense arm ends best with the first seed, with `tune_each` each arm's own is. `contracts` trains the dense twin of
    equal total parameters too, `decompose` twins whose router learns nothing; both end in the report. `promise` is a file that
    `moe promise` wrote about this recipe: every run carries its seal, and the report holds the outcome against it.
    Raises UserError for what the user can correct, TrainingStopped if a run fails.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    _check_arguments(range(seeds) if isinstance(seeds, int) else seeds, jobs, lr_grid, timing_rounds)
    sparse = _load(recipe, overrides, jobs, say)
    numbers = [sparse.seed + i for i in range(seeds)] if isinstance(seeds, int) else list(seeds)
    made = require_promise(promise, sparse) if promise is not None else None
    if made is not None:
        sparse = replace(sparse, logging=replace(sparse.logging, promise=made["sha256"]))
    learn_for(sparse, sparse.forecast)  # past runs that do not suffice are refused before anything trains
    arms, base = arms_of(sparse, contracts, decompose), sparse.name
    out.mkdir(parents=True, exist_ok=True)
    if made is not None:
        write_json(out / PROMISE, made)
    arms, rate, reused = tuned(
        arms,
        lr_grid,
        tune_each,
        lambda run, arm, label: _plan(out, base, run, arm, numbers[0], label),
        lambda plans: find_rate(plans, jobs=jobs, command=train_command, say=say),
        lambda planned: planned.directory.name,
    )
    plans_by_arm = {
        arm: [_plan(out, base, run, arm, seed, reused.get(arm, "") if seed == numbers[0] else "") for seed in numbers]
        for arm, run in arms.items()
    }
    plans_by_arm = watched(plans_by_arm)
    rest = {"seeds": numbers, "jobs": jobs, "learning_rate": rate}
    record = _record(recipe, overrides, plans_by_arm, arms, rest)
    for planned in [planned for plans in plans_by_arm.values() for planned in plans]:
        state_of(planned)  # what is refused is refused before the comparison's own record changes
    write_json(out / "compare.json", record)
    train(_in_order(plans_by_arm), jobs=jobs, command=train_command, say=say)
    for arm, name in (("sparse", "timing"), ("total", "timing_total")) if timing_rounds else ():
        if arm in arms:
            pair = plans_by_arm[arm][0], plans_by_arm["dense"][0]
            time_steps(out, *pair, timing_rounds, timing_command, say, name=name)
    return _reported(out, say)


def _in_order(plans_by_arm: dict[str, list[Planned]]) -> list[Planned]:
    """Seed by seed; a run that is watched comes after the dense twin that it is held against."""
    by_seed = zip(*plans_by_arm.values(), strict=True)
    return [planned for plans in by_seed for planned in sorted(plans, key=lambda one: bool(one.run.forecast.dense))]


def _reported(out: Path, say: Callable[[str], None]) -> Path:
    """Write the report of `out`, say its verdicts, and return its path."""
    page = build_report(out)
    report = read_json(out / "report.json")
    say(report["verdict"]["sentence"])
    if report["contracts"]:
        say(describe(report["contracts"]))
    say(f"report: {page}")
    return page
