"""Time until something is seen: `import torch`, `import moe`, `import moe.model`, and the first loss line of a run.

    python scripts/bench_first_line.py [--rounds 9] [--cpu-time] [--json FILE] [--write docs/benchmarks.md]
    python scripts/bench_first_line.py --clone [--rounds 3] [the same]

Each round starts fresh interpreters one after the other, in rotating order, with files in the system's cache after the first
round, which is not counted. The first loss line is that of `python -m moe train recipes/smoke.py`, from the start of the process
to the line `step 1/40  loss ...`; the corpus is prepared before, once. Differences are within a round.

`--clone` begins earlier: it clones the repository's last commit into an empty folder, installs it there as `scripts/quickstart`
does (`setup` of scripts/_setup.sh: .venv, pip, every dependency under its pin), and trains recipes/smoke.py until its first loss
line, its corpus prepared and the processor's kernels compiled anew. The first round, which is not counted, leaves in pip's
cache what has to be downloaded.

A later run is held to the figures that have a limit; the others are parts, or not ours.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_common import Ratio, keep, machine, options, parse, spread, spread_of_passes

NAME, CLONE = "bench_first_line", "bench_clone"
ROOT = Path(__file__).resolve().parents[1]
WHOLE_WAY = "from git clone to the first loss line"
LIMITS = {
    WHOLE_WAY: 120.0,
    "import moe": 0.3,
    "import moe.model, beyond torch": 0.5,
    "first loss line, beyond torch": 10.0,
}
"""Seconds at most."""


def _import(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True)


def _first_line(python: str = sys.executable, root: Path = ROOT, *settings: str) -> None:
    """Start a run of a checkout and stop it when its first loss line is there."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", str(root / "recipes/smoke.py"), f"out={folder}/run", "logging.console=plain", *settings]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if root != ROOT:  # what this process's Python finds is not for a clone's, and its kernels are not compiled yet
            environment.pop("PYTHONPATH", None)
            environment["MOE_CPU_CACHE"] = f"{folder}/kernels"
        with subprocess.Popen(
            [python, "-m", "moe", *command], stdout=subprocess.PIPE, text=True, env=environment, cwd=root
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


def measure_clone(rounds: int, clock: Callable[[], float]) -> dict[str, Ratio]:
    """Seconds of each part of the way from `git clone` to the first loss line, and of all."""
    parts = ("git clone", "installation", "first loss line")
    seconds: dict[str, list[float]] = {name: [] for name in (*parts, WHOLE_WAY)}
    for index in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            root, marks = Path(folder) / "clone", [clock()]
            subprocess.run(["git", "clone", "--quiet", ROOT.as_uri(), str(root)], check=True)
            marks.append(clock())
            install = f'. "{root}/scripts/_setup.sh"; setup'
            subprocess.run(["bash", "-c", install], check=True, stderr=sys.stderr if not index else subprocess.DEVNULL)
            marks.append(clock())
            _first_line(str(root / ".venv/bin/python"), root, f"data.cache_dir={folder}/data")
            marks.append(clock())
        if index:
            for name, before, after in zip(parts, marks, marks[1:], strict=False):
                seconds[name].append(after - before)
            seconds[WHOLE_WAY].append(marks[-1] - marks[0])
    return {name: spread_of_passes([[value] for value in values]) for name, values in seconds.items()}


def page(figures: dict[str, Ratio], facts: dict[str, str]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [
        " · ".join(f"{key} {value}" for key, value in facts.items()),
        "",
        "| from the start of a process to | s | at most |" if WHOLE_WAY not in figures else "| | s | at most |",
    ]
    lines.append("| --- | --- | --- |")
    lines += [f"| {name} | {value} | {LIMITS.get(name, '')} |" for name, value in figures.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what is asked for."""
    parser = options(__doc__, rounds=9, cpu_time="of the processes")
    parser.add_argument("--clone", action="store_true", help="with cloning and installing; a third of the rounds")
    name = CLONE if parser.parse_known_args()[0].clone else NAME
    arguments = parse(parser, name)
    clock = _processor_time if arguments.cpu_time else time.perf_counter
    rounds = max(2, arguments.rounds // 3) if arguments.clone else arguments.rounds
    figures = (measure_clone if arguments.clone else measure)(rounds, clock)
    kind = "processor time" if arguments.cpu_time else "wall clock"
    facts = {**machine(), "clock": kind, "rounds": str(rounds)}
    text = page(figures, facts)
    print(text)
    ours = {one: figures[one] for one in figures if one in LIMITS}
    keep(arguments, name, text, {"facts": facts, "figures": ours})


if __name__ == "__main__":
    main()
