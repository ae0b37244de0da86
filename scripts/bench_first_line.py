"""Time until something is seen: `import torch`, `import moe`, `import moe.model`, and the first loss line of a run.

    python scripts/bench_first_line.py [--rounds 9] [--cpu-time] [--json FILE] [--write docs/benchmarks.md]

Each round starts fresh interpreters one after the other, in rotating order, with files in the system's cache after the first
round, which is not counted. The first loss line is that of `python -m moe train recipes/smoke.py`, from the start of the process
to the line `step 1/40  loss ...`; the corpus is prepared before, once. Differences are within a round.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_common import Ratio, keep, machine, options, parse, spread

NAME = "bench_first_line"
ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"import moe": 0.3, "import moe.model, beyond torch": 0.5, "first loss line, beyond torch": 10.0}
"""Seconds at most."""


def _import(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True)


def _first_line() -> None:
    """Start a run and stop it when its first loss line is there."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", str(ROOT / "recipes/smoke.py"), f"out={folder}/run", "logging.console=plain"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            [sys.executable, "-m", "moe", *command], stdout=subprocess.PIPE, text=True, env=environment
        ) as run:
            assert run.stdout is not None
            found = next((line for line in run.stdout if line.startswith("step 1/") and "loss" in line), "")
            run.kill()
        if not found:
            sys.exit("the run ended without a loss line")


STARTS: dict[str, Callable[[], None]] = {
    "bare interpreter": lambda: _import("pass"),
    "import torch": lambda: _import("import torch"),
    "import moe": lambda: _import("import moe"),
    "import moe.model": lambda: _import("import moe.model"),
    "first loss line": _first_line,
}


def _processor_time() -> float:
    """Of all processes that this one has started and that have ended."""
    found = os.times()
    return found.children_user + found.children_system


def measure(rounds: int, clock: Callable[[], float]) -> dict[str, Ratio]:
    """Seconds of each start and of the differences that have a limit."""
    seconds: dict[str, list[float]] = {name: [] for name in STARTS}
    names = list(STARTS)
    for index in range(rounds + 1):
        for offset in range(len(names)):
            name = names[(index + offset) % len(names)]
            start = clock()
            STARTS[name]()
            if index:
                seconds[name].append(clock() - start)
    for name in ("import moe.model", "first loss line"):
        pairs = zip(seconds[name], seconds["import torch"], strict=True)
        seconds[f"{name}, beyond torch"] = [late - torch for late, torch in pairs]
    return {name: spread(values) for name, values in seconds.items()}


def page(figures: dict[str, Ratio], facts: dict[str, str]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        " · ".join(f"{key} {value}" for key, value in facts.items()),
        "",
        "| from the start of a process to | s | at most |",
    ]
    lines.append("| --- | --- | --- |")
    lines += [f"| {name} | {value} | {LIMITS.get(name, '')} |" for name, value in figures.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = options(__doc__, rounds=9, cpu_time="of the processes")
    arguments = parse(parser, NAME)
    figures = measure(arguments.rounds, _processor_time if arguments.cpu_time else time.perf_counter)
    clock = "processor time" if arguments.cpu_time else "wall clock"
    facts = {**machine(), "clock": clock, "rounds": str(arguments.rounds)}
    text = page(figures, facts)
    print(text)
    keep(arguments, NAME, text, {"facts": facts, "figures": figures})


if __name__ == "__main__":
    main()
