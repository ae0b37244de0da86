"""What share of a training step goes to metrics and logs, and to waiting for batches: the whole trainer, its functions timed.

    python scripts/bench_metrics.py [--rounds 12] [--passes 6] [--cpu-time] [--json FILE] [--write docs/benchmarks.md]

Two runs through `moe.train.train`, one after the other, with routing logged every 10 steps as it comes: the step of bench_step.py
(T 4,096, D 256, 8 layers), and recipes/smoke.py (T 2,048, D 64, 2 layers), whose steps are some sixty times shorter. A round is
ten steps, so each has one step that logs routing; the rounds are shared out among `--passes` fresh processes, and the first of
each, in which the ledger counts FLOPs, is left out. Timers are around the functions below, none of which calls another; a step
is what passes between two lines of metrics.jsonl. Evaluations and checkpoints have their own intervals and are not part of a
step.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from bench_common import clock_of, in_passes, keep, machine, options, parse, spread_of_passes
from bench_step import step_run

from moe.balance import score_statistics
from moe.config.load import load
from moe.config.schema import Run
from moe.data import Corpus
from moe.train import train
from moe.train.ledger import Ledger
from moe.train.loop import Loop
from moe.train.runlog import RunLog
from moe.train.step import _reduce

NAME = "bench_metrics"
ROOT = Path(__file__).resolve().parents[1]
EVERY = 10
"""Steps of a round, and between two that log routing: the default of logging.routing_every."""
BATCHES = "waiting for batches"
TIMED: dict[str, list[Callable[..., Any]]] = {
    "statistics of routing": [score_statistics],
    "sums of losses and statistics": [_reduce],
    "router weights": [Loop._router_weights],
    "lines of metrics and routing, console, alarms": [RunLog.step, RunLog.routing],
    "ledger, meters included": [Ledger.done],
    BATCHES: [Corpus.train_batch],
}


class Timers:
    """Seconds of each kind, and when each step ended, while the functions are replaced by timed ones."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.spent = dict.fromkeys(TIMED, 0.0)
        self.ends: list[float] = []
        self.sums: list[dict[str, float]] = []
        self.places = [(place, kind, one) for kind, group in TIMED.items() for one in group for place in places(one)]

    def __enter__(self) -> "Timers":
        for place, kind, one in self.places:
            setattr(place, one.__name__, self._timed(kind, one))
        return self

    def __exit__(self, *error: object) -> None:
        for place, _, one in self.places:
            setattr(place, one.__name__, one)

    def _timed(self, kind: str, one: Callable[..., Any]) -> Callable[..., Any]:
        ends_step = one is RunLog.step

        @wraps(one)
        def run(*given: Any, **named: Any) -> Any:
            start = self.clock()
            try:
                return one(*given, **named)
            finally:
                now = self.clock()
                self.spent[kind] += now - start
                if ends_step:
                    self.ends.append(now)
                    self.sums.append(dict(self.spent))

        return run

    def shares(self) -> list[dict[str, tuple[float, float]]]:
        """(milliseconds a step, share of the step) of each kind, by round; the round that warms up is left out."""
        rounds = []
        for first in range(EVERY - 1, len(self.ends) - EVERY, EVERY):
            last = first + EVERY
            seconds = self.ends[last] - self.ends[first]
            spent = {kind: self.sums[last][kind] - self.sums[first][kind] for kind in TIMED}
            rounds.append({kind: (1e3 * value / EVERY, value / seconds) for kind, value in spent.items()})
        return rounds


def places(one: Callable[..., Any]) -> list[Any]:
    """Where a function is looked up: its class, or every module of ours that has it by name."""
    owner, _, name = one.__qualname__.rpartition(".")
    if owner:
        return [getattr(sys.modules[one.__module__], owner)]
    modules = [module for key, module in sys.modules.items() if key.startswith("moe.")]
    return [module for module in modules if getattr(module, name, None) is one]


def measure(run: Run, clock: Callable[[], float]) -> dict[str, list[tuple[float, float]]]:
    """(milliseconds a step, share of the step) of each kind in each round of a run, and of all metrics together."""
    with tempfile.TemporaryDirectory() as folder, Timers(clock) as timers:
        train(run, Path(folder) / "run")
    rounds = timers.shares()
    found = {kind: [one[kind] for one in rounds] for kind in TIMED}
    metrics = [[one[kind] for kind in TIMED if kind != BATCHES] for one in rounds]
    together = [(sum(ms for ms, _ in kinds), sum(share for _, share in kinds)) for kinds in metrics]
    return {"metrics and logs together": together} | found


def one_pass(
    rounds: range, threads: int, clock: Callable[[], float]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """What `measure` finds of both runs, by name, over so many rounds."""
    settings = ["evaluation.every_steps=0", "evaluation.final_rows=8", "evaluation.rows=8", "evaluation.probe_rows=0"]
    settings += [f"logging.routing_every={EVERY}", "logging.console=off", f"train.threads={threads}"]
    settings += ["checkpoint.every_steps=0", f"train.steps={EVERY * (len(rounds) + 1)}"]
    return {
        "step of bench_step.py": measure(step_run(settings), clock),
        "recipes/smoke.py": measure(load(ROOT / "recipes/smoke.py", settings), clock),
    }


def page(passes: list[dict[str, dict[str, list[tuple[float, float]]]]], facts: dict[str, str]) -> str:
    """The table of docs/benchmarks.md."""
    names = list(passes[0])
    lines = [" · ".join(f"{key} {value}" for key, value in facts.items()), ""]
    lines += [f"| a step of | {' | '.join(f'{name}, ms | % of the step' for name in names)} |"]
    lines += ["| --- |" + " --- | --- |" * len(names)]
    for kind in passes[0][names[0]]:
        cells = []
        for name in names:
            milliseconds, share = (
                spread_of_passes([[pair[index] for pair in one[name][kind]] for one in passes]) for index in (0, 1)
            )
            low, middle, high = (100 * value for value in share)
            cells += [f"{milliseconds.middle:.2f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure both runs, print, and write what is asked for."""
    parser = options(__doc__, rounds=12, passes=6, cpu_time="of this process, on one thread")
    arguments = parse(parser, NAME)
    threads = 1 if arguments.cpu_time else 2
    passes = in_passes(arguments.rounds, arguments.passes, one_pass, threads, clock_of(arguments))
    clock = "processor time" if arguments.cpu_time else "wall clock"
    rounds = f"{arguments.rounds} of {EVERY} steps in {arguments.passes} processes"
    facts = {**machine(), "clock": clock, "threads": str(threads), "rounds": rounds}
    text = page(passes, facts)
    print(text)
    figures = {
        f"{name}: {kind}, share": spread_of_passes([[share for _, share in one[name][kind]] for one in passes])
        for name, kinds in passes[0].items()
        for kind in kinds
    }
    keep(arguments, NAME, text, {"facts": facts, "figures": figures})


if __name__ == "__main__":
    main()
