"""A recipe against its dense twins: train every arm for every seed through the trainer's own entry, time them, report.

Everything is a file in one directory: `<arm>-seed<n>.json` (config), `.log`, the run directories, compare.json,
timing.json. Doing the same again reuses finished runs and resumes the others.
"""

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from moe.analysis.contract_report import describe
from moe.analysis.promise import FILE as PROMISE
from moe.analysis.report import build_report
from moe.analysis.rows import read_json, read_run
from moe.analysis.summaries import differences
from moe.config.load import dump, load
from moe.config.schema import Run
from moe.errors import ConfigError, TrainingStopped, UserError
from moe.experiments.arms import arms_of, tuned, twin_record
from moe.experiments.processes import Job, cpu_count, log_tail, run_jobs
from moe.experiments.promise import require_promise
from moe.files import write_json

CONTRACT = "equal active FLOPs per token"
TRAIN = (sys.executable, "-m", "moe.train")
TIMING = (sys.executable, "-m", "moe.experiments.step_timing")
Json = dict[str, Any]
State = Literal["finished", "stopped", "resume", "fresh"]


@dataclass(frozen=True)
class Planned:
    """One training run: `directory`, its config beside it as .json, its log as .log."""

    directory: Path
    run: Run

    @property
    def config(self) -> Path:
        """The config file that the trainer is started with."""
        return self.directory.with_name(self.directory.name + ".json")

    @property
    def log(self) -> Path:
        """The trainer's output, all attempts."""
        return self.directory.with_name(self.directory.name + ".log")


def _plain(run: Run) -> Json:
    return json.loads(json.dumps(dump(run)))


def _plan(out: Path, base: str, run: Run, arm: str, seed: int, label: str = "") -> Planned:
    label = label or f"{arm}-seed{seed}"
    return Planned(out / label, replace(run, seed=seed, name=f"{base}-{arm}-seed{seed}"))


# ------------------------------------------------------------------------------------------------- what is there yet


def _different(planned: Planned) -> list[str]:
    """Settings in which the run that is already in the directory differs from the planned one.

    Not the name, nor what time and energy are charged at; and what is `auto` in the plan may have been resolved.
    """
    found = read_json(planned.directory / "run.json", {"run": (dict,)})["run"]
    return [
        f"{field} is {json.dumps(there)} there and {json.dumps(asked)} here"
        for field, there, asked in differences(found, _plain(planned.run))
        if field != "name" and not field.startswith("cost.") and asked != "auto"
    ]


def _summary(directory: Path) -> Json:
    """A run's summary.json, empty as long as there is none."""
    return read_json(directory / "summary.json") if (directory / "summary.json").exists() else {}


def state_of(planned: Planned) -> State:
    """Whether the planned run is finished, stopped itself, can be resumed, or has to start.

    Raises UserError if another run is there.
    """
    directory = planned.directory
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return "fresh"
    if not (directory / "run.json").exists():
        raise UserError(
            f"{directory} exists and holds no run.json, so it is no run: delete it, or choose another --out."
        )
    different = _different(planned)
    if different:
        raise UserError(
            f"{directory} holds a run of other settings: {'; '.join(different)}. Choose another --out, ask for the "
            "same "
            "settings, or delete that directory."
        )
    summary = _summary(directory)
    if summary.get("status") == "finished" and summary.get("step") != planned.run.train.steps:
        return "resume"
    return summary["status"] if summary.get("status") in ("finished", "stopped") else "resume"


# ----------------------------------------------------------------------------------------------------------- training


def _job(planned: Planned, state: State, command: Sequence[str]) -> Job:
    fresh = (str(planned.config), f"out={planned.directory}")
    arguments = fresh if state == "fresh" else ("--resume", str(planned.directory))
    return Job(planned.directory.name, (*command, *arguments), planned.log)


def train(
    plans: Sequence[Planned],
    *,
    jobs: int,
    command: Sequence[str],
    say: Callable[[str], None],
    may_stop: bool = False,
) -> None:
    """Train whatever is not finished. With `may_stop`, a run that stopped itself (diverged) is no error.

    Raises UserError if a run refused its config, TrainingStopped if one failed, each with the end of its log.
    """
    by_name = {planned.directory.name: planned for planned in plans}
    states: dict[str, State] = {name: state_of(planned) for name, planned in by_name.items()}

    def report(job: Job, code: int, seconds: float) -> None:
        summary = _summary(by_name[job.name].directory)
        status = summary.get("status", "missing")
        if may_stop and status == "stopped":
            say(f"{job.name}: stopped itself after {seconds:.0f} s ({summary.get('reason', 'no reason given')})")
        elif code or status != "finished":
            error = UserError if code == 2 else TrainingStopped
            end = f"exit code {code}" if code else f"status {status}, run the same command again to resume it"
            raise error(f"the run {job.name} failed ({end}); the end of {job.log}:\n{log_tail(job.log)}")
        else:
            bits = read_run(by_name[job.name].directory).final_bits
            say(f"{job.name}: finished in {seconds:.0f} s at {bits:.4f} bits per byte")

    done: tuple[State, ...] = ("finished", "stopped") if may_stop else ("finished",)
    waiting = []
    for name, planned in by_name.items():
        write_json(planned.config, {"schema_version": 1, "run": _plain(planned.run)})
        if states[name] in done:
            say(f"{name}: already {states[name]}, reused")
        else:
            if states[name] != "fresh":
                say(f"{name}: resuming")
            waiting.append(_job(planned, states[name], command))
    run_jobs(waiting, jobs, report)


def find_rate(plans: dict[float, Planned], *, jobs: int, command: Sequence[str], say: Callable[[str], None]) -> Json:
    """Train the dense arm at each learning rate and take the lowest final loss; one that diverges counts as worst."""
    train(list(plans.values()), jobs=jobs, command=command, say=say, may_stop=True)
    tried: list[tuple[float, float | None]] = []
    for lr, planned in plans.items():
        finished = _summary(planned.directory)["status"] == "finished"
        bits = read_run(planned.directory).final_bits if finished else math.nan
        tried.append((lr, bits if math.isfinite(bits) else None))
    finite = [(bits, lr) for lr, bits in tried if bits is not None]
    if not finite:
        raise UserError(f"the dense arm diverged at every learning rate of {sorted(plans)}: try smaller ones.")
    best = min(finite)[1]
    say(
        f"learning rate {best:g}: lowest final loss of the dense arm among "
        f"{', '.join(f'{lr:g}' for lr in sorted(plans))}"
    )
    return {"value": best, "grid": sorted(plans), "tried": tried}


# ------------------------------------------------------------------------------------------------------------- timing


def time_steps(
    out: Path,
    sparse: Planned,
    dense: Planned,
    rounds: int,
    command: Sequence[str],
    say: Callable[[str], None],
    name: str = "timing",
) -> None:
    """Write <name>.json by the interleaved timing, unless it is there for these configs and rounds."""
    target, threads = out / f"{name}.json", cpu_count()
    key = hashlib.sha256(sparse.config.read_bytes() + dense.config.read_bytes() + f"{rounds} {threads}".encode())
    fingerprint = key.hexdigest()[:16]
    if target.exists() and read_json(target).get("fingerprint") == fingerprint:
        say(f"{name}: already measured, reused")
        return
    target.unlink(missing_ok=True)
    files = (str(sparse.config), str(dense.config), str(target))
    options = ("--rounds", str(rounds), "--threads", str(threads))

    def check(job: Job, code: int, seconds: float) -> None:
        if code or not target.exists():
            raise TrainingStopped(f"the timing failed (exit code {code}); the end of {job.log}:\n{log_tail(job.log)}")
        say(f"{name}: {rounds} rounds of both arms in {seconds:.0f} s")

    run_jobs([Job(name, (*command, *files, *options), out / f"{name}.log")], 1, check)
    write_json(target, {**read_json(target), "fingerprint": fingerprint})


# ------------------------------------------------------------------------------------------------------------ compare


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
    rest = {"seeds": numbers, "jobs": jobs, "learning_rate": rate}
    record = _record(recipe, overrides, plans_by_arm, arms, rest)
    for planned in [planned for plans in plans_by_arm.values() for planned in plans]:
        state_of(planned)  # what is refused is refused before the comparison's own record changes
    write_json(out / "compare.json", record)
    by_seed = zip(*plans_by_arm.values(), strict=True)
    train([planned for plans in by_seed for planned in plans], jobs=jobs, command=train_command, say=say)
    for arm, name in (("sparse", "timing"), ("total", "timing_total")) if timing_rounds else ():
        if arm in arms:
            pair = plans_by_arm[arm][0], plans_by_arm["dense"][0]
            time_steps(out, *pair, timing_rounds, timing_command, say, name=name)
    page = build_report(out)
    report = read_json(out / "report.json")
    say(report["verdict"]["sentence"])
    if report["contracts"]:
        say(describe(report["contracts"]))
    say(f"report: {page}")
    return page
