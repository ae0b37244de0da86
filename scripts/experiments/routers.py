"""Every router on the same batches: train, time, rank. `bash scripts/experiments/routers --help`.

Each arm is recipes/smoke.py with one router's defaults (`model.moe.router=<name>`), or its dense twin. Seed by seed, so that a
sweep that was cut short can be ranked too; finished runs are reused, others resumed. Everything lies in one folder:
`<arm>-seed<n>/` are runs of the trainer, `timing.json` the cost of a step. routers_report.py turns them into the page.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from routers_report import write_report

from moe import checkpoint, parallel
from moe.config.load import known_routers, load
from moe.config.schema import Run
from moe.cost import dense_twin
from moe.data import prepare
from moe.experiments.planned import Planned, state_of
from moe.experiments.step_timing import interleave
from moe.files import write_json
from moe.train import resume, train
from moe.train.step import build_state, train_step

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/smoke.py"
BASELINE = "topk"
ESTIMATORS = ("dense_mixer", "default_vector", "sparse_mixer")
"""Gradient estimators that the baseline is trained with besides its own."""


def arms() -> dict[str, list[str]]:
    """Overrides of the sparse arms, by name; the baseline first."""
    names = [BASELINE, *(name for name in known_routers() if name != BASELINE)]
    choices = {name: [f"model.moe.router={name}"] for name in names}
    variants = {f"{BASELINE}+{e}": [*choices[BASELINE], f"model.moe.router.estimator={e}"] for e in ESTIMATORS}
    return choices | variants


def plan(out: Path, arm: str, seed: int, steps: int) -> Planned:
    """One run of the sweep: same data, schedule and seed in all arms."""
    overrides = [
        *arms().get(arm, arms()[BASELINE]),
        f"seed={seed}",
        f"train.steps={steps}",
        f"train.schedule.warmup_steps={steps // 10}",
        "train.threads=1",
        "train.device=cpu",
        "evaluation.every_steps=0",
        "evaluation.final_rows=512",
        f"logging.routing_every={max(1, steps // 50)}",
        "logging.console=off",
    ]
    run = load(str(RECIPE), overrides)
    run = dense_twin(run) if arm == "dense" else run
    return Planned(out / f"{arm}-seed{seed}", replace(run, name=f"routers-{arm}-seed{seed}"))


def train_all(plans: list[Planned]) -> None:
    """Train what is not finished, one after the other in this process."""
    for number, planned in enumerate(plans, 1):
        state, start = state_of(planned), time.monotonic()
        if state == "fresh":
            train(planned.run, planned.directory)
        elif state == "resume":
            resume(planned.directory)
        seconds = f"{time.monotonic() - start:.0f} s" if state != "finished" else "reused"
        print(f"{number}/{len(plans)} {planned.directory.name}: {seconds}", flush=True)


def end_of(planned: Planned) -> Callable[[int], float]:
    """A function that does training steps from a finished run's checkpoint, on its last batches; it writes nothing."""
    run: Run = planned.run
    ranks = parallel.start("cpu")
    state = build_state(run, ranks, prepare(run.data))
    saved = checkpoint.newest(planned.directory)
    assert saved is not None, "a finished run has a checkpoint"
    checkpoint.load(saved, state.model, state.optimizer, ranks)
    return lambda index: train_step(state, run.train.steps - 1 - index % run.train.steps).tokens


def time_all(out: Path, plans: dict[str, Planned], rounds: int) -> None:
    """Write timing.json: tokens per CPU second of each arm and round, all arms in turn in this process."""
    steps = {arm: end_of(planned) for arm, planned in plans.items()}
    tokens = next(iter(plans.values())).run
    write_json(
        out / "timing.json",
        {
            "schema_version": 1,
            "clock": "process_time",
            "threads": torch.get_num_threads(),
            "tokens_per_step": tokens.train.batch_rows * tokens.data.sequence_length,
            "tokens_per_cpu_second": interleave(steps, rounds, clock=time.process_time),
        },
    )


def main() -> None:
    """Train, time and report."""
    parser = argparse.ArgumentParser(prog="scripts/experiments/routers", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/routers"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each arm")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="train these arms and stop there")
    parser.add_argument("--report", action="store_true", help="only write the page from what is there")
    given = parser.parse_args()
    unknown = set(given.only) - {*arms(), "dense"}
    if unknown:
        sys.exit(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join([*arms(), 'dense'])}")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    names = given.only or [*arms(), "dense"]
    plans = {(arm, seed): plan(given.out, arm, seed, given.steps) for seed in range(given.seeds) for arm in names}
    if not given.report:
        given.out.mkdir(parents=True, exist_ok=True)
        train_all(list(plans.values()))
        if given.only:
            return
        time_all(given.out, {arm: plans[arm, 0] for arm in names}, given.rounds)
    command = f"bash scripts/experiments/routers --seeds {given.seeds} --steps {given.steps}"
    print(write_report(given.out, names, given.seeds, BASELINE, command, ROOT / "docs/experiments"))


if __name__ == "__main__":
    main()
