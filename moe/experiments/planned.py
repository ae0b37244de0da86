"""Runs that an experiment plans, each in a folder of its own: which of them are there yet, training the others, timing pairs.

Everything is a file in one directory: `<run>.json` (config), `<run>.log`, the run directory. Doing the same again reuses
finished runs and resumes the others.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moe.analysis.rows import read_json, read_run
from moe.analysis.summaries import differences
from moe.config.load import dump, load
from moe.config.schema import Run
from moe.errors import TrainingStopped, UserError
from moe.experiments.processes import Job, cpu_count, log_tail, run_jobs
from moe.files import write_json

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


# ------------------------------------------------------------------------------------------------- what is there yet


def watched(plans_by_arm: dict[str, list[Planned]]) -> dict[str, list[Planned]]:
    """The plans, with the dense twin's folder in every sparse run that asks for a forecast (`forecast.past` or `promise`)."""
    dense = {planned.run.seed: str(planned.directory) for planned in plans_by_arm["dense"]}

    def beside(planned: Planned) -> Planned:
        asked = planned.run.forecast
        if planned.run.model.moe is None or not (asked.past or asked.promise):
            return planned
        return replace(planned, run=replace(planned.run, forecast=replace(asked, dense=dense[planned.run.seed])))

    return {arm: [beside(planned) for planned in plans] for arm, plans in plans_by_arm.items()}


def _different(planned: Planned) -> list[str]:
    """Settings in which the run that is already in the directory differs from the planned one.

    Not the name, nor what time and energy are charged at, nor who watches the gain; and what is `auto` in the plan may have been
    resolved. A setting that the run's version did not have yet counts as its default, which is how that version behaved.
    """
    path = planned.directory / "run.json"
    read_json(path, {"run": (dict,)})
    found = _plain(load(path))
    return [
        f"{field} is {json.dumps(there)} there and {json.dumps(asked)} here"
        for field, there, asked in differences(found, _plain(planned.run))
        if field != "name" and not field.startswith(("cost.", "forecast.")) and asked != "auto"
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
    """Train one arm at each learning rate and take the lowest final loss; one that diverges counts as worst."""
    train(list(plans.values()), jobs=jobs, command=command, say=say, may_stop=True)
    tried: list[tuple[float, float | None]] = []
    for lr, planned in plans.items():
        finished = _summary(planned.directory)["status"] == "finished"
        bits = read_run(planned.directory).final_bits if finished else math.nan
        tried.append((lr, bits if math.isfinite(bits) else None))
    finite = [(bits, lr) for lr, bits in tried if bits is not None]
    if not finite:
        raise UserError(
            f"{next(iter(plans.values())).run.name} diverged at every learning rate of {sorted(plans)}: try smaller ones."
        )
    best = min(finite)[1]
    say(
        f"learning rate {best:g}: lowest final loss of {plans[best].run.name} among "
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
    threads: int = 0,
) -> None:
    """Write <name>.json by the interleaved timing, unless it is there for these configs and rounds; threads 0: all there are."""
    target, threads = out / f"{name}.json", threads or cpu_count()
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
