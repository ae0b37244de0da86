"""Does sparsity pay, at equal what, and with how many experts? `bash scripts/experiments/sparsity --help`.

recipes/quickstart.py with 4, 8, 16 and 32 experts, 2 per token, against dense models of equal active parameters and of as many
parameters as 8 and 16 experts have in all; the same batches for all, several seeds, a learning rate for each arm. Everything
lies in one folder: `<arm>-seed<n>/` are runs of the trainer, `<arm>-lr<rate>/` the short ones that chose its rate,
`<arm>-lr<rate>-full/` those that decided where the short ones were close, `compare-E<n>/` a comparison for each number of
experts, which `moe report` reads. Finished runs are reused, others resumed.
sparsity_report.py turns them into docs/experiments/sparsity.md.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsity_report import write_report

from moe.analysis.report import build_report
from moe.analysis.rows import read_run
from moe.config.load import load
from moe.config.schema import Run
from moe.cost import dense_total_twin, dense_twin
from moe.experiments.arms import twin_record, with_rate
from moe.experiments.compare import CONTRACT
from moe.experiments.planned import TIMING, TRAIN, Planned, find_rate, time_steps, train
from moe.files import write_json

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
RECIPE = ROOT / "recipes/quickstart.py"
EXPERTS = (4, 8, 16, 32)
DENSE = {"active": 8, "total8": 8, "total16": 16}
"""Dense arms, and the number of experts of the sparse arm that each is the twin of."""
TWINS = {4: "total8", 8: "total8", 16: "total16", 32: "total16"}
"""The larger dense arm that each number of experts is compared with; the smaller is `active` for all."""
ROUTERLESS = {"hash": "hash", "frozen_random": "frozen_random"}
"""Arms of 8 experts whose router learns nothing, and their routers."""
ADVISED = {"E32-advised": ("E32", "model.moe.router.balance.weight=0.01")}
"""Arms that do what `moe doctor` says of another arm's runs, at that arm's rate."""
RATES = (2e-3, 4e-3, 8e-3)
SHORT = 4
"""The rates are chosen in runs of this fraction of the steps."""
CLOSE = 0.03
"""Bits per byte: rates that end no further behind the best there are tried again at full length."""


def arm_run(arm: str, steps: int) -> Run:
    """The config of an arm, at the recipe's learning rate and seed."""
    plain, *advice = ADVISED.get(arm, (arm,))
    experts = int(plain[1:]) if plain.startswith("E") else DENSE.get(arm, 8)
    overrides = [
        f"model.moe.num_experts={experts}",
        f"train.steps={steps}",
        f"train.schedule.warmup_steps={max(1, steps // 20)}",
        "train.threads=1",
        "train.device=cpu",
        f"evaluation.every_steps={max(1, steps // 8)}",
        "evaluation.final_rows=2112",
        "evaluation.probe_rows=0",
        "logging.console=off",
        *advice,
    ]
    if arm in ROUTERLESS:
        overrides.append(f"model.moe.router={ROUTERLESS[arm]}")
    run = load(str(RECIPE), overrides)
    run = dense_twin(run) if arm == "active" else dense_total_twin(run) if arm in DENSE else run
    return replace(run, name=f"sparsity-{arm}")


def plan(out: Path, arm: str, run: Run, seed: int, label: str = "") -> Planned:
    """A run of an arm at its full length."""
    return Planned(out / (label or f"{arm}-seed{seed}"), replace(run, seed=seed, name=f"sparsity-{arm}-seed{seed}"))


def tuned(out: Path, arm: str, steps: int, seed: int, jobs: int) -> tuple[Run, Json, str]:
    """The arm at its best rate with the first seed, what was tried, and the folder of the full run that it then has already.

    Short runs choose; rates that are close there meet again at full length, where another may be better.
    """
    short = arm_run(arm, steps // SHORT)
    short = replace(short, seed=seed, evaluation=replace(short.evaluation, every_steps=0, final_rows=512))
    plans = {
        lr: Planned(out / f"{arm}-lr{lr:g}", replace(with_rate(short, lr), name=f"sparsity-{arm}-lr{lr:g}"))
        for lr in RATES
    }
    found, run, label = find_rate(plans, jobs=jobs, command=TRAIN, say=say), arm_run(arm, steps), ""
    losses = {lr: bits for lr, bits in found["tried"] if bits is not None}
    close = [lr for lr, bits in losses.items() if bits <= min(losses.values()) + CLOSE]
    if len(close) > 1:
        final = {lr: plan(out, arm, with_rate(run, lr), seed, f"{arm}-lr{lr:g}-full") for lr in close}
        at_length = find_rate(final, jobs=jobs, command=TRAIN, say=say)
        found |= {"value": at_length["value"], "tried_at_full_length": at_length["tried"]}
        label = final[found["value"]].directory.name
    return with_rate(run, found["value"]), found, label


def say(line: str) -> None:
    """Progress, a line at a time."""
    print(line, flush=True)


def write_comparison(out: Path, experts: int, plans: dict[str, list[Planned]], rates: dict[str, Json]) -> Path:
    """A folder that `moe report` reads as a comparison of this number of experts with two dense arms."""
    folder = out / f"compare-E{experts}"
    folder.mkdir(exist_ok=True)
    chosen = {"sparse": f"E{experts}", "dense": "active", "total": TWINS[experts]}
    if experts == 8:
        chosen |= {arm: arm for arm in ROUTERLESS if arm in plans}
    names = {role: [f"../{planned.directory.name}" for planned in plans[arm]] for role, arm in chosen.items()}
    sparse, dense = (plans[chosen[role]][0].run for role in ("sparse", "dense"))
    write_json(
        folder / "compare.json",
        {
            "schema_version": 1,
            "contract": CONTRACT,
            "recipe": "recipes/quickstart.py",
            "overrides": [f"model.moe.num_experts={experts}"],
            "command": "bash scripts/experiments/sparsity",
            "arms": {role: names.pop(role) for role in ("sparse", "dense")},
            "more_arms": names,
            "twin": twin_record(sparse, dense),
            "seeds": [planned.run.seed for planned in plans[chosen["sparse"]]],
            "jobs": 1,
            "learning_rate": {
                "value": sparse.train.optimizer.lr,
                "found_by": f"lowest loss of each arm with the first seed after 1/{SHORT} of the steps",
                "grid": list(RATES),
                "tried": rates[chosen["dense"]]["tried"],
                "per_arm": {role: plans[arm][0].run.train.optimizer.lr for role, arm in chosen.items()},
            },
        },
    )
    return folder


def time_all(out: Path, plans: dict[str, list[Planned]], rounds: int) -> None:
    """Interleaved step times of each comparison: sparse against `active`, and the larger dense arm against `active`."""
    for experts in EXPERTS:
        folder = out / f"compare-E{experts}"
        for arm, name in ((f"E{experts}", "timing"), (TWINS[experts], "timing_total")):
            time_steps(folder, plans[arm][0], plans["active"][0], rounds, TIMING, say, name=name)


def bits_of(plans: list[Planned]) -> list[float]:
    """Final bits per byte of finished runs."""
    return [read_run(planned.directory).final_bits for planned in plans]


def main() -> None:
    """Tune, train, time and report."""
    parser = argparse.ArgumentParser(prog="scripts/experiments/sparsity", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sparsity"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each")
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each arm")
    parser.add_argument("--no-decompose", action="store_true", help="leave out the arms whose router learns nothing")
    parser.add_argument("--report", action="store_true", help="only time what is not timed, and write the page")
    given = parser.parse_args()
    if given.seeds < 1 or given.steps < 8 * SHORT or given.jobs < 1:
        sys.exit(f"--seeds and --jobs must be at least 1 and --steps at least {8 * SHORT}")
    os.environ["OMP_NUM_THREADS"] = "1"
    given.out.mkdir(parents=True, exist_ok=True)
    arms = ["active", *(f"E{n}" for n in EXPERTS), "total8", "total16"]
    arms += [] if given.no_decompose else list(ROUTERLESS)
    first = arm_run("active", given.steps).seed
    runs, rates, there = {}, {}, {}
    for arm in arms:
        runs[arm], rates[arm], there[arm] = tuned(given.out, arm, given.steps, first, given.jobs)
    runs |= {arm: with_rate(arm_run(arm, given.steps), rates[plain]["value"]) for arm, (plain, _) in ADVISED.items()}
    write_json(given.out / "rates.json", {"schema_version": 1, "arms": rates})
    seeds = range(first, first + given.seeds)
    plans = {
        arm: [plan(given.out, arm, run, seed, there.get(arm, "") if seed == first else "") for seed in seeds]
        for arm, run in runs.items()
    }
    if not given.report:
        trained = [arm for arm in arms if arm not in ROUTERLESS]
        for part in (trained, [arm for arm in arms if arm in ROUTERLESS], list(ADVISED)):
            train([plans[arm][i] for i in range(given.seeds) for arm in part], jobs=given.jobs, command=TRAIN, say=say)
    for experts in EXPERTS:
        write_comparison(given.out, experts, plans, rates)
    time_all(given.out, plans, given.rounds)
    for experts in EXPERTS:
        say(str(build_report(given.out / f"compare-E{experts}")))
    command = f"bash scripts/experiments/sparsity --seeds {given.seeds} --steps {given.steps}"
    advised = [
        {"arm": plain, "setting": setting}
        | {name: bits_of(plans[one]) for name, one in (("as_is", plain), ("advised", arm))}
        for arm, (plain, setting) in ADVISED.items()
    ]
    say(str(write_report(given.out, EXPERTS, TWINS, advised, command, ROOT / "docs/experiments")))


if __name__ == "__main__":
    main()
