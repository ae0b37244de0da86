"""Run drills and write what came of them: `python -m drills.run` from tests/, or scripts/drills.

Every run trains in this process with the fault injected, then the doctor reads its folder. Outcomes are kept one by one in
`outcomes.jsonl` of --out, so that a stopped command goes on where it was.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from moe.analysis.doctor import examine
from moe.config.load import load
from moe.train import train
from moe.train.alarms import Alarms

from .cases import Case, faults, healthy
from .sizes import HELD_OUT_SIZE, SIZES, base
from .tables import write_tables

JUDGED_SEEDS, TUNING_SEED = (1, 2), 0
HELD_OUT_SEEDS = (4,)


@dataclass(frozen=True)
class Outcome:
    """What the doctor said of one run."""

    case: str
    expected: str | None
    size: str
    seed: int
    named: list[str]
    """Causes at the end of the run, in the order they were named."""
    alarms: list[tuple[int, str]]
    """(step, cause) raised while it trained."""
    layers: list[int]
    """Layers of the first finding."""
    since: int
    """Step from which the fault acts."""
    seconds: float

    @property
    def delay(self) -> int | None:
        """Steps from the fault's first effect to the alarm that names it."""
        steps = [step for step, cause in self.alarms if cause == self.expected and step > self.since]
        return steps[0] - self.since if steps else None


def drill(name: str, case: Case, size: str, seed: int, folder: Path, cache: Path) -> Outcome:
    """Train one run with its fault and let the doctor read it."""
    half = str(SIZES[size]["rows"] // 2)
    run = load(base(size, seed, cache), [text.replace("HALF", half) for text in case.overrides])
    started = time.perf_counter()
    with case.injected():
        train(run, folder)
    alarms = [(row["step"], row["cause"]) for row in read_rows(folder / "alarms.jsonl")]
    return outcome_of(name, case, size, seed, folder, alarms, time.perf_counter() - started)


def diagnose_again(name: str, case: Case, size: str, seed: int, folder: Path) -> Outcome:
    """What today's rules say of a run that was trained before: its rows in the order and at the steps they were looked at."""
    alarms, raised = Alarms(load(folder / "run.json"), folder, 0), []
    rows = {name: read_rows(folder / f"{name}.jsonl") for name in ("metrics", "routing", "health")}
    for step in (row["step"] for row in rows["metrics"]):
        for log in ("metrics", "routing", "health"):
            here = [row for row in rows[log] if row["step"] == step]
            for row in here:
                alarms.add(log, row)
            if here and (log == "health" or (log == "routing" and alarms.due(step))):
                raised += [(step, finding.cause) for finding in alarms.look(step)]
    return outcome_of(name, case, size, seed, folder, raised, 0.0)


def outcome_of(
    name: str, case: Case, size: str, seed: int, folder: Path, alarms: list[tuple[int, str]], seconds: float
) -> Outcome:
    """A run's outcome, with the diagnosis at its end."""
    _, findings = examine(folder)
    layers = list(findings[0].layers) if findings else []
    return Outcome(name, case.cause, size, seed, [f.cause for f in findings], alarms, layers, case.since, seconds)


def read_rows(path: Path) -> list[dict]:
    """Lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def plan(seeds: list[int]) -> list[tuple[str, str, int]]:
    """(case, size, seed) of every run: all seeds at the tuning sizes, and the held-out size once."""
    runs = [(name, "small", seed) for name in faults() for seed in seeds]
    runs += [(name, case.size, seed) for name, case in healthy().items() for seed in seeds]
    held_out = [(name, HELD_OUT_SIZE, seed) for name in (*faults(), *healthy()) for seed in HELD_OUT_SEEDS]
    return runs + held_out


def main() -> int:
    """Run what is asked for and print, and with --write put the tables into a file."""
    parser = argparse.ArgumentParser(
        prog="scripts/drills", description="Faults injected into tiny runs, for the doctor to name."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/drills"), help="folder of runs and outcomes")
    parser.add_argument(
        "--seeds", default="0,1,2", help="seeds at the tuning sizes; 0 is the one thresholds were set on"
    )
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--sizes", choices=("all", "tuning", "held-out"), default="all", help="leave some sizes out")
    parser.add_argument(
        "--write", type=Path, help="markdown file whose drills section is replaced, e.g. docs/doctor.md"
    )
    parser.add_argument("--again", action="store_true", help="let the doctor read the kept folders of --out again")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "outcomes.jsonl"
    if options.again:
        store.unlink(missing_ok=True)
    done = {(o.case, o.size, o.seed): o for o in read_outcomes(store)}
    for name, size, seed in plan([int(seed) for seed in options.seeds.split(",")]):
        kind = "held-out" if size == HELD_OUT_SIZE else "tuning"
        if options.only not in name or options.sizes not in ("all", kind):
            continue
        if (name, size, seed) not in done:
            folder = options.out / f"{name.replace(' ', '-').replace(',', '')}-{size}-{seed}"
            case = {**faults(), **healthy()}[name]
            if options.again and (folder / "summary.json").is_file():
                outcome = diagnose_again(name, case, size, seed, folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                outcome = drill(name, case, size, seed, folder, options.out / "cache")
            done[name, size, seed] = outcome
            with store.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            if not options.keep and not options.again:
                shutil.rmtree(folder)
        o = done[name, size, seed]
        print(
            f"{o.case:34} {o.size:9} seed {o.seed}  {o.seconds:5.1f} s  {', '.join(o.named) or 'nothing'}", flush=True
        )
    text, passed = write_tables(list(done.values()), options.write)
    print(text)
    return 0 if passed else 1


def read_outcomes(path: Path) -> list[Outcome]:
    """Outcomes that are there already."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Outcome(**{**row, "alarms": [tuple(a) for a in row["alarms"]]}) for row in map(json.loads, lines)]


if __name__ == "__main__":
    sys.exit(main())
